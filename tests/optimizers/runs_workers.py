"""Each optimizer in real processes: steps, a save on the way, and the same steps from there."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from malora_dist.checkpoint.read import Checkpoint
from malora_dist.distributed.process_groups import World
from malora_dist.distributed.zero3 import gathered_adapter_state
from malora_dist.optimizers.registry import OPTIMIZERS
from tests.optimizers.made_up import MADE_UP
from tests.resume_workers import LAST, SAVED, Run
from tests.training.workers import STEPS, new_train_step, run_steps

# Large enough that bitsandbytes quantises whole tensors too.
LARGE: dict[str, Any] = {"num_experts": 4, "top_k": 2, "r": 24, "shared_r": 32}
ONE: dict[str, Any] = {"num_experts": 1, "top_k": 1, "shared_r": None}
CASES: dict[str, dict[str, Any]] = {
    **{f"8bit-zero{stage}": {"optim": "adamw_8bit", "zero_stage": stage, "shape": LARGE} for stage in range(4)},
    # Frozen routers: their gradient in step 1 is rounding noise, which Adafactor scales to whole updates.
    "adafactor-zero0": {"optim": "adafactor", "zero_stage": 0, "tied_router": True},
    "adafactor_of_vectors-zero0": {"optim": "adafactor", "zero_stage": 0, "method": "dora", "shape": ONE},
    **{f"made_up-zero{stage}": {"optim": "made_up", "zero_stage": stage} for stage in range(4)},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "8bit-zero3-ep2": CASES["8bit-zero3"] | {"ep_size": 2},
    "made_up-zero0-ep2": CASES["made_up-zero0"] | {"ep_size": 2},
    "made_up-zero2-ep2": CASES["made_up-zero2"] | {"ep_size": 2},
}


def run_cases(
    world: World, folder: str, output: str, cases: dict[str, dict[str, Any]], sources: str | None
) -> dict[str, Any]:
    """All cases; `sources` holds checkpoints of another number of processes to go on from."""
    with mock.patch.dict(OPTIMIZERS, {MADE_UP.name: MADE_UP}):
        return {name: run_case(world, folder, f"{output}/{name}", case, sources) for name, case in cases.items()}


def run_case(world: World, folder: str, output: str, case: dict[str, Any], sources: str | None) -> dict[str, Any]:
    train_step = new_train_step(world, folder, case)
    losses = [result.loss for result in run_steps(train_step, case, range(1, STEPS + 1))]
    weights = dict(gathered_adapter_state(train_step.engine.module))
    if world.is_main:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, f"{output}.safetensors")
    del train_step
    run = Run(world, folder, case)
    run.train(SAVED)
    saver, _ = run.saver(output)
    saver.save(run.state.step, run.json_state(), run.state.random)
    saver.complete()
    run.train(LAST)
    steps, state = run.results, run.whole_state()
    found: dict[str, Any] = {"losses": losses, "kind": run.json_state()["optimizer"]["kind"]}
    run.restore(f"{output}/step-{SAVED:06d}")
    run.train(LAST)
    found["same"] = run.results == steps[SAVED:] and _equal(run.whole_state(), state)
    if sources is not None and (source := Path(sources, Path(output).name, f"step-{SAVED:06d}")).exists():
        run.restore(str(source))
        run.train(LAST)
        before = Checkpoint.open(f"{output}/step-{SAVED:06d}")
        found["apart"] = _apart(run.whole_state(), state, before)
    return found


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _apart(one: dict[str, Tensor], other: dict[str, Tensor], before: Checkpoint) -> float:
    """How far two states' weights are apart, as a share of the way that they have come since `before`."""
    names = before.names("adapter")
    apart = sum(float((one[f"adapter.{name}"] - other[f"adapter.{name}"]).square().sum()) for name in names)
    way = sum(float((before.read("adapter", name) - other[f"adapter.{name}"]).square().sum()) for name in names)
    return float((apart / way) ** 0.5)
