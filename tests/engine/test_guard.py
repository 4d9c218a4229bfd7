"""A number that stops being finite stops every rank, by name, with the weights of the step before."""

from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.engine.guard_workers import TASKS
from tests.engine.workers import make_model

CASES: dict[str, dict[str, Any]] = {
    f"{fault} zero{stage}": {"fault": fault, "zero_stage": stage, "gradient_checkpointing": stage == 3}
    for fault in ("forward", "weight", "backward")
    for stage in (0, 3)
}
FIRST, V_PROJ, GATE_PROJ = (
    f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.gate_proj")
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("guard")
    make_model(folder)
    return run_distributed("tests.engine.guard_workers:failing_steps", 2, folder=str(folder), cases=CASES)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_learned_from_a_step_that_is_not_finite(ranks: list[dict[str, Any]], case: str) -> None:
    for results in ranks:
        assert results[case]["moved by the good step"] and not results[case]["moved by the bad step"]
        assert results[case]["steps"] == 2


@pytest.mark.parametrize("stage", [0, 3])
def test_every_rank_names_step_task_and_layer(ranks: list[dict[str, Any]], stage: int) -> None:
    for results, tasks in zip(ranks, ("a, b", "b, c"), strict=True):
        errors = {fault: results[f"{fault} zero{stage}"]["error"] for fault in ("forward", "weight", "backward")}
        assert errors == {
            # Task a's token is on rank 0 only, which both ranks must know.
            "forward": f"the loss is not finite at step 3: task a, first in layer {FIRST}",
            "weight": f"the loss is not finite at step 3: task {', '.join(TASKS)}, first in layer {V_PROJ}",
            # The fault is on rank 1 only.
            "backward": f"a gradient is not finite at step 3, first in layer {GATE_PROJ}; tasks here: {tasks}",
        }
