"""What `malora evaluate` measures: a run, or an adapter with a recipe."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from malora_dist.config.load import load_config
from malora_dist.config.schema import RunConfig
from malora_dist.errors import ConfigError

TRUST = "model.trust_remote_code"


@dataclass(frozen=True)
class EvaluationTarget:
    """What to evaluate, and the folder that takes the result. run: whether the recipe is a run's own."""

    adapter: Path
    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    run: bool = False

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
                    "rights that you have. A run's own word is not enough; if you trust that code, say it here: "
                    f"malora evaluate {shlex.join([str(self.folder), *self.overrides])} --{TRUST} true"
                )
        return config

    def words(self) -> list[str]:
        """Return the arguments that name it."""
        named = [str(self.folder)] if self.run else ["--adapter", str(self.adapter), "--recipe", self.recipe]
        return [*named, *self.overrides]


def evaluation_target(
    run_dir: str | None, adapter: str | None, recipe: str | None, overrides: Sequence[str]
) -> EvaluationTarget:
    """Return what the arguments name. Raises ConfigError if that is neither a run nor an adapter with a recipe."""
    if (run_dir is None) == (adapter is None):
        raise ConfigError("give either RUN_DIR, or --adapter DIR with --recipe RECIPE")
    if (adapter is None) != (recipe is None):
        raise ConfigError("--adapter DIR and --recipe RECIPE belong together")
    if adapter is not None and recipe is not None:
        return EvaluationTarget(Path(adapter), recipe, tuple(overrides), Path(adapter))
    run = Path(run_dir or "")
    check_run_folder(run)
    return EvaluationTarget(run, str(run / "config.yaml"), tuple(overrides), run, run=True)


def check_run_folder(folder: Path) -> None:
    """Raise ConfigError, with what the folder is instead, if it is not that of a run."""
    if (folder / "config.yaml").is_file():
        return
    problem = "it has no config.yaml" if folder.is_dir() else "there is no such folder"
    if (folder / "adapter_config.json").is_file():
        run = next((parent for parent in folder.parents[:2] if (parent / "config.yaml").is_file()), None)
        problem += (
            f"; it is an adapter of the run {run}"
            if run
            else (f"; it is an adapter: malora evaluate --adapter {shlex.quote(str(folder))} --recipe RECIPE")
        )
    raise ConfigError(f"RUN_DIR={folder} is not the folder of a run: {problem}")
