"""Conflicts of tasks on the shared down-projections S_A: the gradients of a step by task, projected and put back.

Each process adds up the gradients of its own tokens by task (`ops.task_gradients`); at the end of a step their sums
over the processes are the same everywhere, and so is the gradient that DeepSpeed then gets in place of the plain sum.
"""

from typing import Any

import torch
from torch import Tensor, nn

from malora_dist.adapters.input_projection import FusedProjection, InputProjection
from malora_dist.data.loader import MicroBatch
from malora_dist.distributed.process_groups import World, sum_over_processes
from malora_dist.ops.partitioned import whole_shape
from malora_dist.ops.task_gradients import TaskGradients, TokensByTask, without_conflicts


class TaskConflict:
    """Takes the parts of the tasks' gradients of S_A that are against one another out of an optimizer step.

    `start` before each forward; `apply` when all micro-batches of the step have been propagated back, before the
    optimizer steps and before gradients are clipped.
    """

    def __init__(self, model: nn.Module, num_tasks: int, world: World) -> None:
        self.num_tasks, self.world = num_tasks, world
        self.projections = list(_projections(model))
        for projection, _ in self.projections:
            projection.task_gradients = TaskGradients()

    def start(self, batch: MicroBatch) -> None:
        """Tell the layers the tasks of the tokens of the next forward."""
        tasks = [task for task, _ in batch.tasks_and_targets]
        sizes = [0] * self.num_tasks
        for task, tokens in zip(tasks, batch.token_counts, strict=True):
            sizes[task] += tokens
        order_T = torch.argsort(batch.task_ids[batch.token_sample], stable=True)
        tokens_by_task = TokensByTask(order_T, tuple(sizes))
        for projection, _ in self.projections:
            projection.task_gradients.tokens = tokens_by_task

    def apply(self) -> None:
        """Give DeepSpeed the projected gradients of the step."""
        from deepspeed.utils import safe_set_full_grad

        for projection, downs in self.projections:
            sink = projection.task_gradients
            assert sink.sum_GWI is not None
            # The engine takes the mean over processes of a loss times their number.
            total_GWI = sum_over_processes(sink.sum_GWI.contiguous()) / self.world.size
            sink.sum_GWI = None
            parts = total_GWI.split([whole_shape(down)[0] for down in downs], dim=1)
            for down, part_GDI in zip(downs, parts, strict=True):
                if down.requires_grad:
                    projected: Tensor = without_conflicts(part_GDI.flatten(1))
                    safe_set_full_grad(down, projected.view(whole_shape(down)))


def _projections(model: nn.Module) -> list[tuple[Any, list[Any]]]:
    """Return the modules that multiply by S_A, with the S_A of each, in the order of their rows."""
    fused = [module for module in model.modules() if isinstance(module, FusedProjection)]
    found: list[tuple[Any, list[Any]]] = [(module, list(module.downs())) for module in fused]
    covered = {id(down) for _, downs in found for down in downs}
    for module in model.modules():
        if isinstance(module, InputProjection) and module.shared_A is not None and id(module.shared_A) not in covered:
            found.append((module, [module.shared_A]))
    return found
