"""The folder of a run's checkpoints: each one whole or absent, and the old ones removed.

checkpoints/step-000123/          finished; its rename from the partial name was the commit
checkpoints/.step-000124.partial  being written, or left by a killed process
checkpoints/.step-000100.removed  being deleted, or left by a killed process
checkpoints/latest, best          a folder name each
"""

import os
from pathlib import Path

from malora_dist.checkpoint.layout import (
    BEST,
    LATEST,
    MANIFEST,
    Manifest,
    checkpoint_name,
    removed_name,
    step_of,
)
from malora_dist.checkpoint.read import Checkpoint, check_files
from malora_dist.errors import CheckpointError
from malora_dist.files.atomic import partial_name, share_file, to_disk
from malora_dist.files.durable import reading, remove, writing
from malora_dist.files.folder import is_cached


class CheckpointStore:
    """The checkpoints of a run in `folder` (output_dir/checkpoints). Only the main process uses it.

    Steps rise. With `save_total_limit` that many finished checkpoints are kept; `latest` and `best` are never removed,
    so a limit of 1 may keep two. The newest finished folder is the truth, the file `latest` follows it.
    """

    def __init__(self, folder: Path, save_total_limit: int | None = None) -> None:
        assert save_total_limit is None or save_total_limit >= 1
        self.folder, self.save_total_limit = folder, save_total_limit

    def begin(self, step: int) -> Path:
        """Make the empty partial folder of a checkpoint; what killed processes left is removed.

        Raises CheckpointError if it cannot be made, or if this step or a later one is finished already.
        """
        self._check_new(step)
        partial = self._partial(step)
        with writing(partial):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in [*self.folder.glob(".*.partial"), *self.folder.glob(".step-*.removed")]:
                remove(path)
            partial.mkdir()
        return partial

    def commit(self, step: int, manifest: Manifest) -> Path:
        """Finish the checkpoint of `step`, whose files all writers have written, and return its folder.

        Raises CheckpointError, and leaves all finished checkpoints as they are, if a listed file is missing or of
        another size, if files and manifest do not agree, if the step is finished already, or if it cannot be written.
        """
        assert manifest.step == step
        self._check_new(step)
        # Written before the commit, after which a full disk stops nothing.
        pointer = self._write_pointer(LATEST, step)
        partial, finished = self._partial(step), self.folder / checkpoint_name(step)
        complete(partial, manifest)
        with writing(finished):
            to_disk(partial)
            partial.rename(finished)
            to_disk(self.folder)
        self._move_pointer(pointer, LATEST)
        self._remove_old()
        return finished

    def discard(self, step: int) -> None:
        """Remove the partial folder of a checkpoint that is not to be finished; `begin` removes what cannot be now."""
        remove(self._partial(step))

    def mark_best(self, step: int) -> None:
        """Let `best` name this finished checkpoint. Raises CheckpointError if there is none or on a full disk."""
        if step not in self.steps():
            raise CheckpointError(f"{self.folder / checkpoint_name(step)} is not a finished checkpoint to mark as best")
        self._move_pointer(self._write_pointer(BEST, step), BEST)

    def steps(self) -> list[int]:
        """Return the steps of the finished checkpoints, rising."""
        with reading(self.folder):
            if not self.folder.exists():
                return []
            with os.scandir(self.folder) as entries:
                steps = {step_of(entry.name): entry for entry in entries if entry.is_dir(follow_symlinks=False)}
            return sorted(step for step, entry in steps.items() if step is not None and Path(entry, MANIFEST).is_file())

    def latest(self) -> Path | None:
        """Return the newest finished checkpoint, None if there is none."""
        steps = self.steps()
        return self.folder / checkpoint_name(steps[-1]) if steps else None

    def best(self) -> Path | None:
        """Return the checkpoint that `best` names.

        None if there is no such file, or it names no finished checkpoint.
        """
        step = self._best_step()
        return None if step is None else self.folder / checkpoint_name(step)

    def _best_step(self) -> int | None:
        path = self.folder / BEST
        if (path.is_symlink() and not is_cached(path)) or not path.is_file():
            return None
        with reading(path):
            name = path.read_bytes().decode("utf-8", "replace")
        step = step_of(name.removesuffix("\n"))
        return step if step in self.steps() else None

    def _partial(self, step: int) -> Path:
        return self.folder / partial_name(checkpoint_name(step))

    def _check_new(self, step: int) -> None:
        target = self.folder / checkpoint_name(step)
        if os.path.lexists(target):
            raise CheckpointError(f"{target} exists already; a checkpoint is never overwritten")
        newer = [other for other in self.steps() if other > step]
        if newer:
            raise CheckpointError(
                f"{target} would be older than {checkpoint_name(newer[-1])}, the newest checkpoint there; "
                "steps of one folder must rise: use another output_dir, or move the newer checkpoints away"
            )

    def _write_pointer(self, name: str, step: int) -> Path:
        path = self.folder / partial_name(name)
        with writing(path):
            path.write_text(f"{checkpoint_name(step)}\n")
            share_file(path)
        return path

    def _move_pointer(self, written: Path, name: str) -> None:
        with writing(self.folder / name):
            written.replace(self.folder / name)
            to_disk(self.folder)

    def _remove_old(self) -> None:
        """Remove the oldest checkpoints beyond `save_total_limit`, but neither the newest nor the best.

        A process killed meanwhile leaves each checkpoint whole or under a hidden name.
        """
        if self.save_total_limit is None:
            return
        steps = self.steps()
        kept = {steps[-1], self._best_step()}
        excess = len(steps) - self.save_total_limit
        for step in [step for step in steps if step not in kept][: max(0, excess)]:
            path = self.folder / checkpoint_name(step)
            hidden = self.folder / removed_name(path.name)
            with writing(path):
                path.rename(hidden)
                to_disk(self.folder)
            remove(hidden)


def complete(partial: Path, manifest: Manifest) -> None:
    """Write the manifest of a partial folder and check the whole, which a rename then makes a checkpoint.

    Raises CheckpointError if a listed file is missing or of another size, if one is not listed, if a shard holds other
    tensors than the manifest says, or if the manifest cannot be written.
    """
    check_files(partial, manifest, "; the folder must be on a disk that all nodes share")
    with reading(partial):
        strays = [name for name in os.listdir(partial) if name not in manifest.files and not name.startswith(".")]
    if strays:
        raise CheckpointError(f"{partial / min(strays)} is not in the manifest, as each file of a checkpoint must be")
    manifest.write(partial)
    Checkpoint.open(partial)
