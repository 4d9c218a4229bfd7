"""What every part of a run is handed: its recipe, its processes, and what to call between two pieces of work."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from malora_dist.config import RunConfig
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.rank_errors import sharing_errors
from malora_dist.training.preemption import Background, PreemptionCoordinator
from malora_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class RunContext:
    """A run on this process.

    Attributes:
        config: the recipe.
        world: this process's rank among all processes, and its device.
        watchdog: where this process is in its run.
        preemption: what stops all processes together; None where nothing would be saved: evaluation and benchmarks.
    """

    config: RunConfig
    world: World
    watchdog: Watchdog
    preemption: PreemptionCoordinator | None = None

    def poll(self) -> None:
        """Stop if any process was asked to. To be called between two pieces of work, by every process alike.

        Raises:
            Preempted: on all processes, if one was asked to stop.
            CheckpointError: on all processes, if the checkpoint that is being written failed.
        """
        if self.preemption is None:
            self.watchdog.heartbeat()
        else:
            self.preemption.poll()

    def while_waiting(self) -> AbstractContextManager[Callable[[], None]]:
        """Give a `poll` for work in which processes are not in step; what fails on one of them is raised on all.

        See `PreemptionCoordinator.while_waiting`; where nothing would be saved, the work is not interrupted.
        """
        if self.preemption is None:
            return self._alone()
        return self.preemption.while_waiting()

    @contextmanager
    def _alone(self) -> Iterator[Callable[[], None]]:
        with sharing_errors(self.world):
            yield self.watchdog.heartbeat

    def with_background(self, background: Background) -> "RunContext":
        """Return the context whose `poll` also completes a checkpoint that is written in the background."""
        assert self.preemption is not None
        return replace(self, preemption=replace(self.preemption, background=background))
