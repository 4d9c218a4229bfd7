"""Where a run starts: anew, or from a checkpoint of a run that may go on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malora_dist.checkpoint.layout import CHECKPOINTS, Manifest, checkpoint_name
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.config import RunConfig, config_from_dict, load_config, plain_config
from malora_dist.config.changes import Change, changes
from malora_dist.engine.outcome import FINISHED, read_outcome
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.parallel.groups import World, fail_together


@dataclass(frozen=True)
class Start:
    """Where a run starts. `folder` is the run folder it goes on in, None for a new one; `checkpoint` its state."""

    folder: str | None = None
    checkpoint: str | None = None
    notes: tuple[str, ...] = ()


def find_start(config: RunConfig) -> Start:
    """Read train.resume_from_checkpoint and what is on the disk; for the main process.

    Raises ConfigError if the run in output_dir is finished or another one, or if the recipe differs from the
    checkpoint's in what the result depends on; CheckpointError if a checkpoint is damaged.
    """
    wanted = config.train.resume_from_checkpoint
    if wanted is None:
        return Start()
    run = Path(config.output_dir)
    if wanted == "auto":
        return _go_on(config, run)
    begun = _begun_from(wanted, run)
    if begun and CheckpointStore(run / CHECKPOINTS).latest() is not None:
        return _go_on(config, run)
    folder = _newest_in(Path(wanted))
    notes = _compare(config, Checkpoint.open(folder).manifest.config, f"train.resume_from_checkpoint={wanted}")
    return Start(str(run) if begun else None, str(folder), notes)


def _begun_from(path: str, run: Path) -> bool:
    """Whether `run` is an unfinished run that started from that path: the same command again, in a requeued job."""
    if not (run / "config.yaml").is_file():
        return False
    outcome = read_outcome(run)
    finished = outcome is not None and outcome["outcome"] == FINISHED
    return not finished and load_config(run / "config.yaml").train.resume_from_checkpoint == path


def _go_on(config: RunConfig, run: Path) -> Start:
    if not (run / "config.yaml").is_file():
        return Start()
    store = CheckpointStore(run / CHECKPOINTS)
    newest = store.latest()
    outcome = read_outcome(run)
    if (outcome is not None and outcome["outcome"] == FINISHED) or (newest is None and (run / "adapter").is_dir()):
        again = f" Or give train.resume_from_checkpoint={newest}, for a new run from its state." if newest else ""
        raise ConfigError(
            f"output_dir={run}: the run there is finished. --new-run starts another beside it; malora evaluate and "
            f"malora report look at this one.{again}"
        )
    if newest is None:
        before = plain_config(load_config(run / "config.yaml"))
        notes = _compare(config, before, f"output_dir={run}")
        return Start(str(run), None, (*notes, f"{run} has no checkpoint yet: its training starts again"))
    notes = _compare(config, Checkpoint.open(newest).manifest.config, f"output_dir={run}")
    return Start(str(run), str(newest), notes)


def _newest_in(path: Path) -> Path:
    """A checkpoint's folder, or the newest one of a run."""
    if (path / CHECKPOINTS).is_dir():
        newest = CheckpointStore(path / CHECKPOINTS).latest()
        if newest is None:
            raise CheckpointError(f"train.resume_from_checkpoint={path}: {path / CHECKPOINTS} holds no checkpoint")
        return newest
    return path


def _compare(config: RunConfig, before: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Notes on what is different. Raises ConfigError where it would change the result."""
    found = changes(_completed(before), plain_config(config))
    refused = [change for change in found if change.kind == "refused"]
    if refused:
        listed = "\n  ".join(str(change) for change in refused)
        raise ConfigError(
            f"{where}: the run there was started with another recipe, and going on would give another result:\n"
            f"  {listed}\nSet these back to go on, or start a new run: --new-run, or another output_dir"
        )
    return tuple(_note(change) for change in found if change.key not in ("output_dir", "train.resume_from_checkpoint"))


def _completed(before: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored config with the defaults of keys that did not exist when it was stored."""
    try:
        completed: Mapping[str, Any] = plain_config(config_from_dict(before))
        return completed
    except ConfigError:
        return before


def _note(change: Change) -> str:
    return f"changed since: {change}" + (" (same numbers to rounding)" if change.kind == "topology" else "")


def open_checkpoint(folder: Path, world: World) -> Checkpoint:
    """A checkpoint whose files are as they were written; the processes share the work of checking.

    Raises CheckpointError on all processes, naming the file.
    """
    error = None
    try:
        checkpoint = Checkpoint.open(folder)
        checkpoint.verify(sorted(checkpoint.manifest.files)[world.rank :: world.size])
    except CheckpointError as caught:
        error = caught
    fail_together(error)
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
