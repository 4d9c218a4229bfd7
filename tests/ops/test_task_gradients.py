"""Gradients by task, and the sum of them without conflicts, against the naive twin."""

import pytest
import torch

from malora_dist.ops.input_projection import project
from malora_dist.ops.task_gradients import TaskGradients, TokensByTask, without_conflicts
from tests.reference import conflict_reference

CLOSE = {"rtol": 1e-12, "atol": 1e-14}


@pytest.mark.parametrize("G", [1, 2, 3, 6])
def test_the_sum_without_conflicts_equals_the_twin(G: int) -> None:
    grads = torch.randn(G, 7, generator=torch.Generator().manual_seed(G), dtype=torch.float64)
    found = without_conflicts(grads)
    torch.testing.assert_close(found, conflict_reference(list(grads)), **CLOSE)
    assert torch.allclose(found, grads.sum(dim=0)) == (G == 1)


def test_gradients_that_agree_and_tasks_without_tokens_stay_a_plain_sum() -> None:
    grads = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads[1] = 0
    assert torch.equal(without_conflicts(grads), grads.sum(dim=0))
    against = torch.stack([grads[0], -grads[0]])
    assert without_conflicts(against).abs().max() < 1e-15


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("num_gates", [0, 2])
def test_each_task_has_the_gradient_of_its_tokens(p: float, num_gates: int) -> None:
    """Of all downs of a product, over two micro-batches; the gradients that autograd gets are those without tasks."""
    T, inputs, G = 11, 5, 3
    draw = torch.Generator().manual_seed(1)
    x_TI = torch.randn(T, inputs, generator=draw, dtype=torch.float64, requires_grad=True)
    shapes = [(2, inputs), (4, inputs)] + [(3, inputs)] * num_gates
    weights = [torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in shapes]
    downs, gates = weights[:2], weights[2:]
    task_T = torch.randint(2, (T,), generator=draw)  # the last task has no token
    keys_T = torch.arange(T, dtype=torch.int32) if p else None
    direction = [torch.randn(T, width, generator=draw, dtype=torch.float64) for width in (inputs, 6, 3 * num_gates)]

    def gradients(tasks: TaskGradients | None, mask_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = project(x_TI, downs, gates, keys_T, 3, p, tasks=tasks)
        total = sum((out * part * mask_T[:, None]).sum() for out, part in zip(outputs, direction, strict=True))
        return torch.autograd.grad(total, [x_TI, *weights])

    tasks, all_T = TaskGradients(), torch.ones(T, dtype=torch.float64)
    order_T = torch.argsort(task_T, stable=True)
    tasks.tokens = TokensByTask(order_T, tuple(torch.bincount(task_T, minlength=G).tolist()))
    for _ in range(2):
        found, wanted = gradients(tasks, all_T), gradients(None, all_T)
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert tasks.sum_GWI is not None and tasks.sum_GWI.shape == (G, 6, inputs)
    for task in range(G):
        own = torch.cat(gradients(None, (task_T == task).double())[1:3])
        torch.testing.assert_close(tasks.sum_GWI[task], 2 * own, **CLOSE)
