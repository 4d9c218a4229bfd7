"""Weights of supervised tokens against the loss of one process that sees the whole step."""

import pytest
import torch

from malora_dist.ops.loss import batch_counts, target_weights
from tests.reference import loss_reference

# [rank][micro-batch][sample] -> (task, supervised tokens): very unequal, some samples, one rank and task 2 with none.
STEP = [
    [[(0, 1)], [(1, 3), (1, 0)]],
    [[(1, 150), (0, 0)], [(1, 50), (0, 7)]],
    [[(2, 0)], [(2, 0), (0, 0)]],
]
EMPTY = [[[(0, 0)], [(1, 0), (2, 0)]]]
NUM_TASKS = 4


def _micro_batches(step: list) -> list[list[tuple[int, int]]]:
    """(task, supervised tokens) of each sample, of every micro-batch of every rank."""
    return [micro_batch for rank in step for micro_batch in rank]


def _weights(samples: list[tuple[int, int]], step_counts: torch.Tensor, normalization: str) -> torch.Tensor:
    tasks, counts = (torch.tensor(values) for values in zip(*samples, strict=True))
    return target_weights(
        torch.arange(len(samples)).repeat_interleave(counts), tasks, counts, step_counts, normalization
    )


@pytest.mark.parametrize("normalization", ["token", "sample", "task"])
@pytest.mark.parametrize("step", [STEP, EMPTY], ids=["unequal", "empty"])
def test_weighted_sum_is_the_loss_of_the_whole_step(step: list, normalization: str) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = [[[torch.rand(n, generator=generator) for _, n in samples] for samples in rank] for rank in step]
    tasks = [[[task for task, _ in samples] for samples in rank] for rank in step]
    (expected,) = loss_reference([losses], normalization, [tasks])
    batches = _micro_batches(step)
    counts = torch.stack([batch_counts(batch, NUM_TASKS) for batch in batches]).sum(dim=0)
    weights = [_weights(batch, counts, normalization) for batch in batches]
    flat = [torch.cat(samples) for rank in losses for samples in rank]
    assert [w.shape for w in weights] == [values.shape for values in flat]
    total = sum((w.double() * values.double()).sum() for w, values in zip(weights, flat, strict=True))
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    assert float(sum(w.double().sum() for w in weights)) == pytest.approx(1.0 if step is STEP else 0.0, rel=1e-6)


def test_counts_of_a_micro_batch() -> None:
    counts = batch_counts([(1, 1), (1, 0), (0, 3), (1, 1)], NUM_TASKS)
    assert counts.dtype == torch.float64  # fp32 stops counting at 2^24
    assert counts.tolist() == [3, 2, 0, 0, 3]
