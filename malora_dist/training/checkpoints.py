"""The checkpoints of a run: its engine, loader and metrics to disk and back."""

from collections.abc import Mapping

from malora_dist.adapters.io.folder import AdapterInfo
from malora_dist.checkpoint.layout import CHECKPOINTS, checkpoint_name, is_of_run
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.config import RunConfig, plain_config
from malora_dist.training.base_model import base_quantizer
from malora_dist.training.best_checkpoint import Best
from malora_dist.training.checkpoint_saver import Description, Saver
from malora_dist.training.run_logger import RunLogger
from malora_dist.training.training_state import LoopState, TrainingParts, restore_training, training_state


class RunCheckpoints:
    """Saves and restores one run. Every process calls every method alike."""

    def __init__(
        self,
        logger: RunLogger,
        parts: TrainingParts,
        base: Mapping[str, str | None],
        digests: Mapping[str, Mapping[str, str]],
    ) -> None:
        """Make the checkpoints of the run that `logger` writes.

        Args:
            logger: which names the run's recipe and folder.
            parts: what is saved and restored.
            base: the base model (`base_model.base_identity`).
            digests: those of the tasks' rows, by split and task.
        """
        config, train_step = logger.config, parts.train_step
        self.beside = {"data": digests, "quantizer": base_quantizer(config)}
        self.parts, self.watchdog = parts, train_step.watchdog
        self.saver = Saver(
            parts.tensors,
            parts.optimizer,
            train_step.world,
            logger.folder / CHECKPOINTS,
            _description(config, train_step.world.size, base, logger.adapter_info()),
            save_total_limit=config.train.save_total_limit,
            asynchronous=config.train.async_save,
            saved=logger.record,
            poll=self.watchdog.heartbeat,
        )

    def restore(self, checkpoint: Checkpoint, state: LoopState) -> None:
        """Restore the run, and `state` with it, from a checkpoint. Raises as `restore_training`.

        The best validation of a run that scored otherwise than `state.best`, or in another folder, is forgotten.
        """
        by = state.best.by
        restore_training(checkpoint, self.parts, state)
        if state.best.by != by or not is_of_run(checkpoint.folder, self.saver.folder.parent):
            state.best = Best(by=by)
        self.saver.point_at_best(state.best.step)

    def save(self, state: LoopState, best: bool) -> None:
        """Begin to save the state after the last completed step."""
        self.watchdog.mark_phase(f"saving {checkpoint_name(state.step)}")
        content = training_state(self.parts, state)
        self.saver.save(state.step, {**content, **self.beside}, state.random, best=best)

    def complete(self) -> None:
        """Return when every save that has begun is a checkpoint."""
        self.watchdog.mark_phase("finishing a checkpoint")
        self.saver.complete()


def _description(
    config: RunConfig, world_size: int, base: Mapping[str, str | None], adapter: AdapterInfo
) -> Description:
    parallel = config.parallel
    topology = {"world_size": world_size, "ep_size": parallel.ep_size, "zero_stage": parallel.zero_stage}
    return Description(config=plain_config(config), base=dict(base), topology=topology, adapter=adapter)
