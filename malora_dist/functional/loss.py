"""Weights of supervised tokens, so that a step's loss does not depend on how samples were dealt to ranks.

The loss of an optimizer step is a weighted sum of cross-entropies over everything in the global batch. Averaging
inside a micro-batch and then over ranks and micro-batches is another, wrong number as soon as their counts differ.
"""

import torch
from torch import Tensor


def batch_counts(target_sample_N: Tensor, task_ids_B: Tensor, num_tasks: int) -> Tensor:
    """(num_tasks + 1,) float64: supervised tokens of each task, and samples with at least one supervised token.

    Add these up over the micro-batches and ranks of a step before calling `target_weights`.
    """
    per_sample_B = torch.bincount(target_sample_N, minlength=len(task_ids_B))
    counts = torch.zeros(num_tasks + 1, dtype=torch.float64, device=task_ids_B.device)
    counts[:num_tasks].index_add_(0, task_ids_B, per_sample_B.double())
    counts[num_tasks] = (per_sample_B > 0).sum()
    return counts


def target_weights(target_sample_N: Tensor, task_ids_B: Tensor, step_counts: Tensor, normalization: str) -> Tensor:
    """(N,) fp32: the weight of each supervised token's cross-entropy in the step's loss; 1 in sum over a step.

    token: every token counts the same. sample: every sample, whatever its length. task: every task of the batch.
    """
    task_counts, samples = step_counts[:-1], step_counts[-1]
    if normalization == "token":
        weights_B = (1 / task_counts.sum().clamp(min=1)).expand(len(task_ids_B))
    elif normalization == "sample":
        per_sample_B = torch.bincount(target_sample_N, minlength=len(task_ids_B)).clamp(min=1)
        weights_B = 1 / (per_sample_B * samples.clamp(min=1))
    else:
        assert normalization == "task", normalization
        present = (task_counts > 0).sum().clamp(min=1)
        weights_B = 1 / (task_counts.clamp(min=1) * present)[task_ids_B]
    return weights_B[target_sample_N].float()
