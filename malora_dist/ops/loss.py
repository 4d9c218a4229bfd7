"""Weights of supervised tokens, so that a step's loss does not depend on how samples were dealt to ranks.

The loss of an optimizer step is a weighted sum of cross-entropies over everything in the global batch. Averaging
inside a micro-batch and then over ranks and micro-batches is another, wrong number as soon as their counts differ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def batch_counts(tasks_and_targets: Sequence[tuple[int, int]], num_tasks: int) -> Tensor:
    """Count supervised tokens of each task, and samples with at least one: (num_tasks + 1,) float64.

    Made on the host from the task and the number of supervised tokens of each sample. Add these up over the
    micro-batches and ranks of a step before calling `target_weights`.
    """
    counts = [0] * (num_tasks + 1)
    for task, targets in tasks_and_targets:
        counts[task] += targets
        counts[num_tasks] += targets > 0
    return torch.tensor(counts, dtype=torch.float64)


def target_weights(
    target_sample_N: Tensor, task_ids_B: Tensor, target_counts_B: Tensor, step_counts: Tensor, normalization: str
) -> Tensor:
    """Compute the weight of each supervised token's cross-entropy in the step's loss, (N,) fp32; 1 in sum over a step.

    token: every token counts the same. sample: every sample, whatever its length. task: every task of the batch.
    """
    task_counts, samples = step_counts[:-1], step_counts[-1]
    if normalization == "token":
        weights_B = (1 / task_counts.sum().clamp(min=1)).expand(len(task_ids_B))
    elif normalization == "sample":
        weights_B = 1 / (target_counts_B.clamp(min=1) * samples.clamp(min=1))
    else:
        assert normalization == "task", normalization
        present = (task_counts > 0).sum().clamp(min=1)
        weights_B = 1 / (task_counts.clamp(min=1) * present)[task_ids_B]
    return weights_B[target_sample_N].float()


def sum_by_group(value_N: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """Sum each group's values in fp64 in a fixed order, (num_groups,); the order of CUDA's `index_add` varies.

    For few groups: it reads every value once for each.
    """
    groups_G = torch.arange(num_groups, device=group_N.device)
    return torch.where(group_N == groups_G[:, None], value_N, 0).sum(dim=1, dtype=torch.float64)
