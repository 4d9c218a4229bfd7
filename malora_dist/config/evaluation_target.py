"""What `malora evaluate` measures: a run, or an adapter with a recipe."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from malora_dist.config.load import load_config
from malora_dist.config.schema import RunConfig
from malora_dist.errors import ConfigError
from malora_dist.files import run_files
from malora_dist.files.atomic import check_writable

TRUST = "model.trust_remote_code"


@dataclass(frozen=True)
class EvaluationTarget:
    """What to evaluate, and where the result goes.

    Attributes:
        adapter: the folder of the adapter, or of the run.
        recipe, overrides: with the base model and the tasks.
        folder: takes result and log.
        run: whether the recipe is a run's own.
        output: a new file that takes the result instead; then there is no log.
        save: False to print the result and write nothing.
    """

    adapter: Path
    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    run: bool = False
    output: Path | None = None
    save: bool = True

    @property
    def log_file(self) -> Path | None:
        """Return the file of the log, None where nothing is to be written into `folder`."""
        return self.folder / "evaluate.log" if self.save and self.output is None else None

    def check_output(self) -> None:
        """Check that the result can be written, before anything is measured. For rank 0.

        Raises:
            ConfigError: `folder` cannot be written, or `output` exists already or is in no folder that can.
        """
        if not self.save:
            return
        if self.output is not None and os.path.lexists(self.output):
            raise ConfigError(f"--output {self.output} exists, and is not overwritten")
        place = self.folder if self.output is None else self.output.parent
        try:
            check_writable(place)
        except OSError as error:
            raise ConfigError(
                f"{place} cannot be written: {error.strerror}. --output FILE writes the result elsewhere, --no-save "
                "only prints it"
            ) from error

    def config(self) -> RunConfig:
        """Return the recipe with its overrides.

        Raises ConfigError if it lets code of a model's folder run, and only the run says so: it may be somebody else's.
        """
        config = load_config(self.recipe, self.overrides)
        if self.run and config.model.trust_remote_code:
            unless_told = load_config(self.recipe, [f"--{TRUST}=false", *self.overrides])
            if not unless_told.model.trust_remote_code:
                raise ConfigError(
                    f"{self.recipe} says {TRUST}: true, so that code of {config.model.name_or_path} would run with all "
                    "of your permissions. A run folder may not decide that; if you trust the code, say so here: "
                    f"malora evaluate {shlex.join([str(self.folder), *self.overrides])} --{TRUST} true"
                )
        return config

    def words(self) -> list[str]:
        """Return the arguments that name it."""
        named = [str(self.folder)] if self.run else ["--adapter", str(self.adapter), "--recipe", self.recipe]
        output = [] if self.output is None else ["--output", str(self.output)]
        return [*named, *output, *([] if self.save else ["--no-save"]), *self.overrides]


def evaluation_target(
    run_dir: str | None,
    adapter: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    output: Path | None = None,
    save: bool = True,
) -> EvaluationTarget:
    """Return what the arguments name. Raises ConfigError if that is neither a run nor an adapter with a recipe."""
    if output is not None and not save:
        raise ConfigError("--output FILE and --no-save exclude each other")
    if (run_dir is None) == (adapter is None):
        raise ConfigError("give either RUN_DIR, or --adapter DIR with --recipe RECIPE")
    if (adapter is None) != (recipe is None):
        raise ConfigError("--adapter DIR and --recipe RECIPE belong together")
    if adapter is not None and recipe is not None:
        return EvaluationTarget(Path(adapter), recipe, tuple(overrides), Path(adapter), output=output, save=save)
    run = Path(run_dir or "")
    check_run_folder(run)
    return EvaluationTarget(run, str(run / run_files.CONFIG), tuple(overrides), run, run=True, output=output, save=save)


def check_run_folder(folder: Path) -> None:
    """Raise ConfigError, with what the folder is instead, if it is not that of a run."""
    if (folder / run_files.CONFIG).is_file():
        return
    problem = f"it has no {run_files.CONFIG}" if folder.is_dir() else "there is no such folder"
    if (folder / "adapter_config.json").is_file():
        run = next((parent for parent in folder.parents[:2] if (parent / run_files.CONFIG).is_file()), None)
        problem += (
            f"; it is an adapter of the run {run}"
            if run
            else (f"; it is an adapter: malora evaluate --adapter {shlex.quote(str(folder))} --recipe RECIPE")
        )
    raise ConfigError(f"RUN_DIR={folder} is not the folder of a run: {problem}")
