"""One start of a run: the folder it works in, the checkpoint it goes on from, and how it ended."""

import logging
import os
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock

from malora_dist.checkpoint.layout import CHECKPOINTS, checkpoint_name
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.config import RunConfig
from malora_dist.console.log import LOGGER
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.rank_errors import run_on_rank0
from malora_dist.errors import CheckpointError, MaloraError
from malora_dist.files.exit_status import (
    EXIT_OK,
    EXIT_PREEMPTED,
    FAILED,
    FINISHED,
    PREEMPTED,
    clear_exit_status,
    write_exit_status,
)
from malora_dist.training.best_checkpoint import Best, scored_by
from malora_dist.training.preemption import Preempted
from malora_dist.training.process import code_of
from malora_dist.training.resume import ResumePoint, find_resume_point, is_finished, is_run
from malora_dist.training.run_folder import claim_run_folder, lock_run_folder, lock_seconds
from malora_dist.training.run_logger import RunLogger
from malora_dist.training.training_state import LoopState


class RunLifecycle:
    """A context from the search for a run to go on with until exit.json is written. Every process enters and leaves it.

    Raises ConfigError, CheckpointError or TrainingError on all processes if the run cannot start here; exit.json of a
    run that could have gone on then says so.

    Attributes:
        resume_point: where the run starts.
        state: how far it has come; the loop updates it.
        logger: what writes the run's folder, once it is open.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.state = LoopState(best=Best(by=scored_by(config.train)))
        self.logger: RunLogger | None = None
        self._lock: BaseFileLock | None = None
        self.resume_point: ResumePoint = run_on_rank0(self._find_resume_point, world)

    def _find_resume_point(self) -> ResumePoint:
        """Find it under the run's lock: a process that is about to end may still be saving."""
        run = Path(self.config.output_dir)
        if self.config.train.resume_from_checkpoint is None or not is_run(run):
            return find_resume_point(self.config)
        self._lock = lock_run_folder(run, lock_seconds(os.environ, self.config.parallel.timeout_seconds))
        try:
            point = find_resume_point(self.config)
        except MaloraError as error:
            if not is_finished(run):
                self._write(run, FAILED, code_of(error), str(error))
            self._release()
            raise
        clear_exit_status(run)
        return point

    def open(self) -> RunLogger:
        """Open the folder of the run that is resumed, or of a new one, and return its RunLogger."""
        folder = run_on_rank0(self._folder, self.world)
        # The config written there names that folder, and is one to go on with.
        changes: dict[str, object] = {"output_dir": folder}
        if self.config.train.resume_from_checkpoint is None:
            changes["train"] = self.config.train.model_copy(update={"resume_from_checkpoint": "auto"})
        self.logger = RunLogger(self.config.model_copy(update=changes), Path(folder), self.world)
        self.logger.notes(self.resume_point.notes)
        return self.logger

    def _folder(self) -> str:
        if self.resume_point.folder is not None:
            return self.resume_point.folder
        folder, self._lock = claim_run_folder(self.config.output_dir)
        return str(folder)

    def __enter__(self) -> "RunLifecycle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Preempted):
            self._preempted(error)
        elif isinstance(error, Exception):
            self._failed(error)
        elif error is None:
            run_on_rank0(lambda: self._write(self._written_to(), FINISHED, EXIT_OK, ""), self.world)
        self._release()

    def _preempted(self, stop: Preempted) -> None:
        logger = self.logger or self.open()
        logger.close()
        step = run_on_rank0(lambda: self._write(logger.folder, PREEMPTED, EXIT_PREEMPTED, stop.reason), self.world)
        other = "" if str(logger.folder) == self.config.output_dir else f" with --output_dir {logger.folder}"
        other += " and without --new-run" if self.config.train.resume_from_checkpoint is None else ""
        logging.getLogger(LOGGER).info(
            "stopped after step %d: %s; the same command%s resumes the run", step, stop.reason, other
        )

    def _failed(self, error: Exception) -> None:
        folder = self._written_to()
        if not self.world.is_main or folder is None:
            return
        try:
            self._write(folder, FAILED, code_of(error), str(error).strip() or repr(error))
        except CheckpointError as second:
            # Keep the original exception.
            error.add_note(str(second))
        if self.logger is not None:
            self.logger.close_after_failure()

    def _written_to(self) -> Path | None:
        if self.logger is not None:
            return self.logger.folder
        return None if self.resume_point.folder is None else Path(self.resume_point.folder)

    def _write(self, folder: Path | None, outcome: str, code: int, reason: str) -> int:
        """Write exit.json; return the last completed step: that of the newest checkpoint, if not restored yet."""
        assert folder is not None
        steps = CheckpointStore(folder / CHECKPOINTS).steps()
        step = max([self.state.step, *steps])
        name = checkpoint_name(steps[-1]) if steps else None
        write_exit_status(folder, outcome, code, reason=reason, step=step, checkpoint=name)
        return step

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
