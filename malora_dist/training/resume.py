"""Where a run starts: from its beginning, or from a checkpoint that fits its recipe, base and data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malora_dist.checkpoint.layout import CHECKPOINTS, Manifest, checkpoint_name, is_of_run, pointed_at
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.config import RunConfig, config_from_dict, load_config, plain_config
from malora_dist.config.resume_compatibility import Change, changes
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.rank_errors import sharing_errors
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files import run_files
from malora_dist.files.exit_status import FINISHED, read_exit_status
from malora_dist.training.base_model import base_quantizer


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts.

    Attributes:
        folder: the run folder that it goes on in; None for a new one.
        checkpoint: the folder of the state that it goes on from; None from the beginning.
        notes: for the log.
    """

    folder: str | None = None
    checkpoint: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def goes_on(self) -> bool:
        """Return whether it continues work of its own folder, and so keeps what was measured and recorded there."""
        if self.folder is None or self.checkpoint is None:
            return False
        return is_of_run(Path(self.checkpoint), Path(self.folder))


def find_resume_point(config: RunConfig) -> ResumePoint:
    """Find where a run starts, by train.resume_from_checkpoint and what is on the disk.

    For the main process, which holds output_dir's lock. A run without a checkpoint starts again, also by another
    recipe.

    Raises:
        ConfigError: the run in output_dir is finished or was begun elsewhere, or the recipe differs from the
            checkpoint's in what the result depends on.
        CheckpointError: a checkpoint is damaged.
    """
    wanted, run = config.train.resume_from_checkpoint, Path(config.output_dir)
    if wanted is None:
        return ResumePoint()
    if wanted == "auto":
        return _go_on(config, run) if is_run(run) else ResumePoint()
    begun = is_run(run)
    if begun and (is_finished(run) or CheckpointStore(run / CHECKPOINTS).latest() is not None):
        _check_begun_from(Path(wanted), run)
        return _go_on(config, run)
    where = f"train.resume_from_checkpoint={wanted}"
    try:
        folder = _newest_in(Path(wanted))
        before = Checkpoint.open(folder).manifest
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    again = (_again(run),) if begun else ()
    return ResumePoint(
        str(run) if begun else None, str(folder), (*_compare_with_checkpoint(config, before, where), *again)
    )


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (folder / run_files.CONFIG).is_file()


def is_finished(run: Path) -> bool:
    """Return whether the exit.json of the folder shows a finished run. Raises CheckpointError if it is damaged."""
    outcome = read_exit_status(run)
    return outcome is not None and outcome["outcome"] == FINISHED


def _check_begun_from(path: Path, run: Path) -> None:
    """Raise ConfigError unless the run there is the one that this command, of a requeued job, began."""
    begun_from = load_config(run / run_files.CONFIG).train.resume_from_checkpoint
    if begun_from in (None, "auto") or Path(begun_from).resolve() != path.resolve() or is_finished(run):
        raise ConfigError(
            f"train.resume_from_checkpoint={path} starts a new run, but output_dir={run} holds a run already; "
            "give another output_dir"
        )


def _go_on(config: RunConfig, run: Path) -> ResumePoint:
    newest = CheckpointStore(run / CHECKPOINTS).latest()
    if is_finished(run) or (newest is None and _is_of_old(run)):
        again = f" Or give train.resume_from_checkpoint={newest} and another output_dir." if newest else ""
        raise ConfigError(
            f"output_dir={run}: the run there is finished. --new-run starts another beside it; malora evaluate and "
            f"malora report look at this one.{again}"
        )
    if newest is None:
        # Nothing is lost, whatever has changed: most often the mistake that ended the start before.
        return ResumePoint(str(run), None, (*_changed_since(config, run), _again(run)))
    notes = _compare_with_checkpoint(config, Checkpoint.open(newest).manifest, f"output_dir={run}")
    return ResumePoint(str(run), str(newest), notes)


def _is_of_old(run: Path) -> bool:
    """Return whether a version without checkpoints has finished there; later ones may be killed after the adapter."""
    return (run / run_files.ADAPTER).is_dir() and not (run / run_files.MEASURED_ON).exists()


def _changed_since(config: RunConfig, run: Path) -> tuple[str, ...]:
    """Return notes on how the recipe differs from that of an earlier start; none if that cannot be read any more."""
    try:
        before = plain_config(load_config(run / run_files.CONFIG))
    except ConfigError:
        return ()
    return _notes(changes(before, plain_config(config)))


def _again(run: Path) -> str:
    return f"{run} has no checkpoint yet: its training starts again"


def _newest_in(path: Path) -> Path:
    """Return a checkpoint's folder, or the newest one of a run."""
    if (path / CHECKPOINTS).is_dir():
        newest = CheckpointStore(path / CHECKPOINTS).latest()
        if newest is None:
            raise CheckpointError(f"{path / CHECKPOINTS} holds no checkpoint")
        return newest
    return pointed_at(path)


def _compare_with_checkpoint(config: RunConfig, before: Manifest, where: str) -> tuple[str, ...]:
    """Return notes on what differs. Raises ConfigError for another recipe, CheckpointError for other 4-bit codes."""
    notes = _compare(config, before.config, where)
    name, found, wanted = checkpoint_name(before.step), before.state.get("quantizer"), base_quantizer(config)
    if wanted is None or found == wanted:
        return notes
    if found is None:
        return (
            *notes,
            f"{name} does not tell how its 4-bit base was quantised: here by {wanted}, a few codes may differ",
        )
    raise CheckpointError(
        f"{where}: {name} was trained on a base quantised by {found}, this version of malora_dist quantises by "
        f"{wanted}; resume with the version that wrote it, or start a new run"
    )


def _compare(config: RunConfig, before: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return notes on what differs. Raises ConfigError where it would change the result."""
    found = changes(_completed(before), plain_config(config))
    refused = [change for change in found if change.kind == "refused"]
    if refused:
        listed = "\n  ".join(str(change) for change in refused)
        raise ConfigError(
            f"{where}: the run there was started with another recipe, so resuming would change the result:\n  "
            f"{listed}\nRestore these to resume, or start a new run: --new-run, or another output_dir"
        )
    return _notes(found)


def _notes(found: Sequence[Change]) -> tuple[str, ...]:
    return tuple(_note(change) for change in found if change.key not in ("output_dir", "train.resume_from_checkpoint"))


def _completed(before: Mapping[str, Any]) -> Mapping[str, Any]:
    """Complete a stored config with the defaults of keys that did not exist when it was stored."""
    try:
        completed: Mapping[str, Any] = plain_config(config_from_dict(before))
        return completed
    except ConfigError:
        return before


def _note(change: Change) -> str:
    return f"changed since: {change}" + (" (same numbers to rounding)" if change.kind == "topology" else "")


def open_checkpoint(folder: Path, world: World) -> Checkpoint:
    """Open a checkpoint, and check that its files are as they were written; the processes share the work.

    Raises:
        CheckpointError: on all processes, naming the file.
    """
    with sharing_errors(world):
        checkpoint = Checkpoint.open(folder)
        checkpoint.verify(sorted(checkpoint.manifest.files)[world.rank :: world.size])
    return checkpoint


def check_base(manifest: Manifest, base: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the base model is the one the checkpoint was trained on."""
    for key in ("fingerprint", "dtype"):
        if manifest.base.get(key) != base[key]:
            raise CheckpointError(
                f"{checkpoint_name(manifest.step)} was trained on the base {manifest.base.get('name')} with {key}="
                f"{manifest.base.get(key)!r}; model.name_or_path={base['name']} has {key}={base[key]!r} here. "
                + ("Set model.dtype" if key == "dtype" else "Give the same base, or start a new run")
            )


def check_data(manifest: Manifest, data: Mapping[str, Mapping[str, str]]) -> None:
    """Raise CheckpointError, naming the task, unless the tasks' rows are those of the checkpoint's run."""
    before = manifest.state["data"]
    for split, digests in data.items():
        for task in dict.fromkeys([*before[split], *digests]):
            if before[split].get(task) != digests.get(task):
                raise CheckpointError(
                    f"data.tasks: the {split} rows of task {task!r} are not those of "
                    f"{checkpoint_name(manifest.step)}; put them back, or start a new run"
                )
