"""A number that stops being finite stops every rank, by name, with the weights of the step before."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.adapters.adapted_layers import adapter_parameters, mixture_layers
from malora_dist.training import nonfinite_check
from malora_dist.training.nonfinite_check import NonFiniteCheck, first_nonfinite_layer
from tests.multiprocess import run_distributed
from tests.training.nonfinite_check_workers import TASKS
from tests.training.workers import build_model, make_model


def test_a_search_that_fails_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hooks would wait for the device in every later forward."""
    layer = nn.Linear(1, 1)
    monkeypatch.setattr(nonfinite_check, "mixture_layers", lambda _model: [("layer", layer)])

    def broken(*_: Any) -> None:
        assert len(layer._forward_hooks) == 1
        raise RuntimeError("out of memory")

    monkeypatch.setattr(nonfinite_check, "set_token_keys", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        first_nonfinite_layer(SimpleNamespace(module=layer), [object()], torch.device("cpu"), seed=0, step=1)  # type: ignore[list-item]
    assert not layer._forward_hooks


CASES: dict[str, dict[str, Any]] = {
    f"{fault} zero{stage}": {"fault": fault, "zero_stage": stage, "gradient_checkpointing": stage == 3}
    for fault in ("forward", "weight", "backward")
    for stage in (0, 3)
}
# Only the first of two micro-batches is broken; the second is whole.
FIRST_BACKWARD: dict[str, dict[str, Any]] = {
    "first backward zero0": {"zero_stage": 0},
    "first backward zero1": {"zero_stage": 1},
    "first backward zero2 ep2": {"zero_stage": 2, "ep_size": 2},
    "first backward zero3 offload": {"zero_stage": 3, "offload": True},
}
CASES |= {name: {**case, "fault": "first backward"} for name, case in FIRST_BACKWARD.items()}
FIRST, V_PROJ, GATE_PROJ = (
    f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.gate_proj")
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("guard")
    make_model(folder)
    return run_distributed("tests.training.nonfinite_check_workers:failing_steps", 2, folder=str(folder), cases=CASES)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_learned_from_a_step_that_is_not_finite(ranks: list[dict[str, Any]], case: str) -> None:
    for results in ranks:
        assert results[case]["moved by the good step"] and not results[case]["moved by the bad step"]
        assert results[case]["steps"] == 2


@pytest.mark.distributed
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


@pytest.mark.distributed
@pytest.mark.parametrize("case", FIRST_BACKWARD)
def test_a_whole_micro_batch_after_a_broken_one_hides_nothing(ranks: list[dict[str, Any]], case: str) -> None:
    for results, tasks in zip(ranks, ("a, b", "b, c"), strict=True):
        message = f"a gradient is not finite at step 3, first in layer {GATE_PROJ}; tasks here: {tasks}"
        assert results[case]["error"] == message


class _Operations(TorchDispatchMode):
    """Counts what would start a kernel: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def _backward(model: nn.Module, seed: int) -> int:
    """The operations of the backward of some loss."""
    ids = torch.randint(0, 95, (1, 9), generator=torch.Generator().manual_seed(seed))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with _Operations() as operations:
        loss.backward()
    return operations.count


@pytest.mark.parametrize("held_bytes", [1, 2**25])
def test_norms_of_all_gradients_at_a_handful_of_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_bytes: int
) -> None:
    monkeypatch.setattr("malora_dist.training.nonfinite_check.HELD_BYTES", held_bytes)
    make_model(tmp_path)
    model = build_model(str(tmp_path), {"zero_stage": 0}, None, {})
    for _, layer in mixture_layers(model):
        nn.init.normal_(layer.B, std=0.1)
    parameters = [parameter for _, parameter in adapter_parameters(model) if parameter.requires_grad]
    unwatched = _backward(model, 1)
    reached: list[str] = []
    check = NonFiniteCheck(model, torch.device("cpu"), reached.append)
    largest_P = torch.zeros(len(parameters))
    for seed in (1, 2):
        for parameter in parameters:
            parameter.grad = None
        started = _backward(model, seed)
        with _Operations() as operations:
            check.collect()
        if held_bytes > 1:
            assert started == unwatched and operations.count == 3
        largest_P = torch.maximum(largest_P, torch.stack([p.grad.norm() for p in parameters if p.grad is not None]))
    torch.testing.assert_close(check.norms_P, largest_P)
    names = [name for name, _ in mixture_layers(model)]
    assert list(dict.fromkeys(reached))[::-1] == names and len(reached) == 2 * len(parameters)
    assert check.first_bad_layer(check.norms_P.tolist()) is None
    bad = [math.nan if layer in names[3:5] else 1.0 for layer in check.layers]
    assert check.first_bad_layer(bad) == names[4]
    check.clear()
    assert not check.norms_P.any()
