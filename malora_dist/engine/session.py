"""One start of a run: which folder it works in, from where it goes on, and how it ended."""

import logging
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from malora_dist.checkpoint.layout import CHECKPOINTS, checkpoint_name
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.config import RunConfig
from malora_dist.engine.loop import LoopState
from malora_dist.engine.outcome import (
    EXIT_OK,
    EXIT_PREEMPTED,
    FAILED,
    FINISHED,
    PREEMPTED,
    clear_outcome,
    write_outcome,
)
from malora_dist.engine.outputs import RunOutputs
from malora_dist.engine.process import code_of
from malora_dist.engine.progress import LOGGER
from malora_dist.engine.resume import find_start
from malora_dist.engine.run_folder import claim_run_folder, lock_run_folder
from malora_dist.engine.stop import Preempted
from malora_dist.parallel.groups import World, on_main


class Session:
    """From the look for a run to go on with to exit.json. Every process makes one; all leave it alike.

    Raises ConfigError or CheckpointError on all if the run cannot start here.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.world, self.state = world, LoopState()
        self.start = on_main(lambda: find_start(config), world)
        self.outputs: RunOutputs | None = None
        self._lock: FileLock | None = None
        if self.start.folder is not None:
            on_main(lambda: self._hold(Path(self.start.folder)), world)
        self.config = config

    def open(self) -> RunOutputs:
        """The run's folder to write in: that of the run that goes on, or a new one."""
        folder = on_main(self._folder, self.world)
        # The config written there names that folder.
        self.outputs = RunOutputs(self.config.model_copy(update={"output_dir": folder}), Path(folder), self.world)
        self.outputs.notes(self.start.notes)
        return self.outputs

    def _folder(self) -> str:
        if self.start.folder is not None:
            return str(self.start.folder)
        folder = claim_run_folder(self.config.output_dir)
        self._hold(folder)
        return str(folder)

    def _hold(self, folder: Path) -> None:
        self._lock = lock_run_folder(folder)
        clear_outcome(folder)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Preempted):
            self._preempted(error)
        elif isinstance(error, Exception):
            self._write(FAILED, code_of(error), str(error).strip() or repr(error))
        elif error is None:
            self._write(FINISHED, EXIT_OK, "")
        if self._lock is not None:
            self._lock.release()

    def _preempted(self, stop: Preempted) -> None:
        outputs = self.outputs or self.open()
        outputs.close()
        step = on_main(lambda: self._write(PREEMPTED, EXIT_PREEMPTED, stop.reason), self.world)
        logging.getLogger(LOGGER).info(
            "ended early after step %d: %s; the same command goes on from there", step, stop.reason
        )

    def _write(self, outcome: str, code: int, reason: str) -> int:
        """The last completed step: that of the newest checkpoint, if the session ended before it was restored."""
        folder = self.outputs.folder if self.outputs is not None else self.start.folder
        if not self.world.is_main or folder is None:
            return self.state.step
        steps = CheckpointStore(Path(folder) / CHECKPOINTS).steps()
        step = max([self.state.step, *steps])
        checkpoint = checkpoint_name(steps[-1]) if steps else None
        write_outcome(Path(folder), outcome, code, reason=reason, step=step, checkpoint=checkpoint)
        return step
