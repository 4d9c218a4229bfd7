"""The checkpoints of a run: its engine, loader and window to disk and back."""

from malora_dist.adapters.io.folder import AdapterInfo
from malora_dist.checkpoint.layout import CHECKPOINTS, checkpoint_name, is_of_run
from malora_dist.checkpoint.read import Checkpoint
from malora_dist.config import RunConfig, plain_config
from malora_dist.data.loader import TrainLoader
from malora_dist.distributed.optimizer_state import optimizer_state
from malora_dist.distributed.snapshot import whole_tensors
from malora_dist.training.base_model import base_quantizer
from malora_dist.training.best_checkpoint import Best
from malora_dist.training.checkpoint_saver import Description, Saver
from malora_dist.training.loop import LoopState
from malora_dist.training.run_logger import RunOutputs
from malora_dist.training.step_metrics import Window
from malora_dist.training.train_step import Stepper
from malora_dist.training.training_state import restore_training, training_state


class RunCheckpoints:
    """Saves and restores one run. Every process calls every method alike."""

    def __init__(
        self,
        config: RunConfig,
        outputs: RunOutputs,
        stepper: Stepper,
        loader: TrainLoader,
        window: Window,
        base: dict[str, str | None],
        digests: dict[str, dict[str, str]],
    ) -> None:
        """`digests` are those of the tasks' rows, by split and task."""
        self.beside = {"data": digests, "quantizer": base_quantizer(config)}
        self.stepper, self.loader, self.window = stepper, loader, window
        self.tensors = whole_tensors(stepper.engine.module, config.train.optim)
        self.optimizer = optimizer_state(stepper.engine, config.parallel.zero_stage, config.train.optim)
        self.saver = Saver(
            self.tensors,
            self.optimizer,
            stepper.world,
            outputs.folder / CHECKPOINTS,
            _description(config, stepper.world.size, base, outputs.adapter_info()),
            save_total_limit=config.train.save_total_limit,
            asynchronous=config.train.async_save,
            saved=outputs.record,
            waiting=stepper.position.alive,
        )

    def restore(self, checkpoint: Checkpoint, best_by: str) -> LoopState:
        """Put a checkpoint's state into engine, loader and window; where training goes on. See `restore_training`.

        `best_by` is how this run scores; the best of one that scored otherwise, or in another folder, is forgotten.
        """
        state = restore_training(
            checkpoint,
            self.stepper.engine,
            self.optimizer,
            self.stepper.balance,
            self.tensors,
            self.loader,
            self.window,
            self.stepper.world,
        )
        if state.best.by != best_by or not is_of_run(checkpoint.folder, self.saver.folder.parent):
            state.best = Best(by=best_by)
        self.saver.point_at_best(state.best.step)
        return state

    def save(self, state: LoopState, best: bool) -> None:
        """Begin to save the state after the last completed step."""
        self.stepper.position.enter(f"saving {checkpoint_name(state.step)}")
        content = training_state(self.stepper.engine, self.optimizer, self.stepper.balance, state, self.window)
        self.saver.save(state.step, {**content, **self.beside}, state.random, best=best)

    def complete(self) -> None:
        """Return when every save that has begun is a checkpoint."""
        self.stepper.position.enter("finishing a checkpoint")
        self.saver.complete()


def _description(config: RunConfig, world_size: int, base: dict[str, str | None], adapter: AdapterInfo) -> Description:
    parallel = config.parallel
    topology = {"world_size": world_size, "ep_size": parallel.ep_size, "zero_stage": parallel.zero_stage}
    return Description(config=plain_config(config), base=base, topology=topology, adapter=adapter)
