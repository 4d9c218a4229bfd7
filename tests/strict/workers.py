"""What processes with a GPU each find out about training steps, all in one launch."""

from typing import Any

from malora_dist.engine.step import Stepper
from malora_dist.parallel.groups import World
from tests.engine.guard_workers import failing_steps
from tests.engine.workers import new_stepper, run_steps

STEPS = 2


def find_out(world: World, folder: str, cases: dict[str, Any], faults: dict[str, Any]) -> dict[str, Any]:
    """Losses, balance losses and gradient norms of the first steps of each case, and what each fault leads to."""
    return {"steps": {name: first_steps(world, folder, case) for name, case in cases.items()}} | {
        "faults": failing_steps(world, folder, faults)
    }


def first_steps(world: World, folder: str, case: dict[str, Any]) -> dict[str, list[float]]:
    stepper = new_stepper(world, folder, case, Stepper)
    assert {parameter.device for parameter in stepper.trained} == {world.device} or case["zero_stage"] == 3
    results = run_steps(stepper, case, range(1, STEPS + 1))
    return {
        "losses": [result.loss for result in results],
        "aux_losses": [result.aux_loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
    }
