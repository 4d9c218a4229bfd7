"""The state of training: what a checkpoint holds beside tensors, and how an engine of any topology is restored."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from malora_dist.checkpoint.read import Checkpoint, optimizer_kind
from malora_dist.console.log import LOGGER
from malora_dist.data.loader import TrainLoader
from malora_dist.distributed.optimizer_state import OptimizerState, optimizer_state
from malora_dist.distributed.rank_errors import sharing_errors
from malora_dist.distributed.snapshot import Whole, restore, whole_tensors
from malora_dist.errors import CheckpointError, short
from malora_dist.optimizers.spec import OptimizerSpec
from malora_dist.training.balance_loss import StepBalance
from malora_dist.training.best_checkpoint import Best
from malora_dist.training.deepspeed_engine import RATIO, base_learning_rate
from malora_dist.training.random_state import random_state, set_random_state
from malora_dist.training.step_metrics import StepMetrics
from malora_dist.training.train_step import TrainStep


@dataclass
class LoopState:
    """How far a run has come: after `step` optimizer steps.

    Attributes:
        validated: nothing that is due after `step` is left to do.
        loader: where the next batch begins.
        random: the state of this process's generators after `step`.
        best: the best validation so far.
    """

    step: int = 0
    validated: bool = True
    loader: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)
    best: Best = field(default_factory=Best)


@dataclass(frozen=True)
class TrainingParts:
    """The parts of a run that steps change and checkpoints restore.

    Attributes:
        train_step: the engine with its balance loss.
        loader: this process's batches.
        step_metrics: what the steps since the last records have measured.
        tensors: all tensors of the adapter.
        optimizer: the optimizer's state of them.
    """

    train_step: TrainStep
    loader: TrainLoader
    step_metrics: StepMetrics
    tensors: list[Whole]
    optimizer: OptimizerState

    @classmethod
    def of(cls, train_step: TrainStep, loader: TrainLoader, optim: str) -> "TrainingParts":
        """Return the parts of a run whose engine was just built with the optimizer `optim`."""
        engine = train_step.engine
        optimizer = optimizer_state(engine, train_step.settings.zero_stage, optim)
        return cls(train_step, loader, StepMetrics(train_step), whole_tensors(engine.module, optim), optimizer)


def training_state(parts: TrainingParts, state: LoopState) -> dict[str, Any]:
    """Return plain JSON of everything that decides how training continues, the same on every process.

    Every process must call it.
    """
    engine, optimizer = parts.train_step.engine, parts.optimizer
    group, spec, counted = engine.optimizer.param_groups[0], optimizer.spec, optimizer.step_count()
    return {
        "optimizer": {
            "kind": spec.kind,
            "step": state.step if counted is None else counted,
            **{key: list(group[key]) if isinstance(group[key], tuple) else group[key] for key in spec.group_keys},
            "lr": base_learning_rate(engine.optimizer),
        },
        "scheduler": {"last_epoch": engine.lr_scheduler.last_epoch},
        "balance": parts.train_step.balance.state_dict(),
        "loader": state.loader,
        "window": parts.step_metrics.state_dict(),
        "validated": state.validated,
        "best": state.best.as_dict(),
    }


def restore_training(checkpoint: Checkpoint, parts: TrainingParts, state: LoopState) -> None:
    """Restore fresh `parts` and `state` from a checkpoint of any topology.

    Raises:
        CheckpointError: on every process alike, if the checkpoint's tensors are not those of this model, or if its
            optimizer, schedule or data are others.
    """
    step, saved = checkpoint.manifest.step, checkpoint.manifest.state
    engine = parts.train_step.engine
    check_optimizer(checkpoint, parts.optimizer.spec)
    check_tensors(checkpoint, parts.tensors)
    parts.loader.load_state_dict(saved["loader"])
    restore(parts.tensors, parts.optimizer, step, checkpoint.read_elements)
    _restore_schedule(checkpoint, engine, parts.optimizer)
    engine.global_steps, engine.global_samples = step, step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    _restore_balance(checkpoint, parts.train_step.balance)
    parts.step_metrics.load_state_dict(saved["window"])
    world = parts.train_step.world
    with sharing_errors(world):
        set_random_state(_random_state_of(checkpoint, world.rank))
    state.step, state.validated, state.best = step, saved["validated"], Best(**saved["best"])
    state.loader, state.random = parts.loader.state_dict(), random_state()


def check_optimizer(checkpoint: Checkpoint, spec: OptimizerSpec) -> None:
    """Raise CheckpointError unless the checkpoint's optimizer is `spec`."""
    kind = optimizer_kind(checkpoint.manifest)
    if kind != spec.kind:
        raise CheckpointError(
            f"{checkpoint.folder}: its optimizer is {short(kind)}, train.optim={spec.name} is {spec.kind!r}; a run "
            "must be resumed with the optimizer it was started with"
        )


def check_tensors(checkpoint: Checkpoint, tensors: list[Whole]) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly the tensors of this model, in their shapes."""
    wanted = {whole.name: whole.shape for whole in tensors}
    found = {name: checkpoint.shape("adapter", name) for name in checkpoint.names("adapter")}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {found.get(name, 'none')} in the checkpoint and "
                f"{wanted.get(name, 'none')} in this model"
            )
    trained = {f"{state}.{whole.name}" for whole in tensors for state in whole.states}
    missing = sorted(trained - set(checkpoint.names("optimizer")))
    if missing:
        raise CheckpointError(f"{checkpoint.folder} has no {missing[0]}: that tensor was not trained there")


def _restore_balance(checkpoint: Checkpoint, balance: StepBalance) -> None:
    """Restore the expert counts of the last step. Older checkpoints have none: then as before step 1."""
    if "balance" in checkpoint.manifest.state:
        balance.load_state_dict(checkpoint.manifest.state["balance"], str(checkpoint.folder))
    else:
        logging.getLogger(LOGGER).info(
            "%s has no expert counts, so the first step from here does not balance experts", checkpoint.folder
        )


def _restore_schedule(checkpoint: Checkpoint, engine: Any, optimizer: OptimizerState) -> None:
    saved, step = checkpoint.manifest.state["optimizer"], checkpoint.manifest.step
    counted = optimizer.step_count()
    if (saved["step"], step if counted is None else counted) != (step, step):
        raise CheckpointError(f"{checkpoint.folder}: its optimizer has taken {saved['step']} steps instead of {step}")
    scheduler = engine.lr_scheduler
    # One step from the one before sets the rates of all groups; a count above 1 says that the optimizer has stepped.
    scheduler.last_epoch, scheduler._step_count = checkpoint.manifest.state["scheduler"]["last_epoch"] - 1, step + 1
    scheduler.step()
    for group in engine.optimizer.param_groups:
        for key in optimizer.spec.group_keys:
            value = group[key] / group.get(RATIO, 1.0) if key == "lr" else group[key]
            if not _equal(value, saved[key]):
                raise CheckpointError(
                    f"{checkpoint.folder}: {optimizer.spec.label}'s {key} was {saved[key]!r} after step {step}, this "
                    f"recipe gives {value!r}"
                )


def _equal(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple | list) else [(one, other)]
    return all(math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-300) for a, b in pairs)


def _random_state_of(checkpoint: Checkpoint, rank: int) -> dict[str, Any]:
    """Return the generators' state of a rank; empty if the run had fewer processes."""
    own = [name for name in checkpoint.names("rng") if name.startswith(f"{rank}.")]
    return {name.partition(".")[2]: checkpoint.read("rng", name) for name in own}
