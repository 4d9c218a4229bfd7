"""What processes with a GPU each find out about training steps, all in one launch."""

from typing import Any

import torch
import torch.distributed as dist

from malora_dist.distributed.process_groups import World
from malora_dist.training.train_step import TrainStep
from tests.training.nonfinite_check_workers import failing_steps
from tests.training.workers import new_train_step, run_steps

STEPS = 2


def find_out(world: World, folder: str, cases: dict[str, Any], faults: dict[str, Any]) -> dict[str, Any]:
    """The first steps of each case, what each fault leads to, and what collectives refuse."""
    return {
        "refused": refused(world),
        "steps": {name: first_steps(world, folder, case) for name, case in cases.items()},
        "faults": failing_steps(world, folder, faults),
    }


def refused(world: World) -> dict[str, str]:
    """What the groups themselves say to a tensor, without the checks of `tests.multiprocess` before them."""
    device, host = torch.ones(3, 2, device=world.device), torch.ones(3, 2)
    default: Any = dist.distributed_c10d._get_default_group()
    tried = {
        "transposed": (default, device.T),
        "host": (default, host),
        "device over hosts": (world.control, device),
        "right": (default, device),
        "host over hosts": (world.control, host),
    }
    return {name: _said(group, tensor) for name, (group, tensor) in tried.items()}


def _said(group: Any, tensor: torch.Tensor) -> str:
    try:
        group.allreduce([tensor]).wait()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return f"sum {float(tensor.sum())}"


def first_steps(world: World, folder: str, case: dict[str, Any]) -> dict[str, list[float]]:
    """Losses, balance losses and gradient norms."""
    train_step = new_train_step(world, folder, case, TrainStep)
    assert {parameter.device for parameter in train_step.trained} == {world.device} or case["zero_stage"] == 3
    results = run_steps(train_step, case, range(1, STEPS + 1))
    return {
        "losses": [result.loss for result in results],
        "aux_losses": [result.aux_loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
    }
