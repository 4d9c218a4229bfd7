"""An optimizer that the package does not know: a row, and nothing else."""

from typing import Any

import torch

from malora_dist.optimizers.spec import Elementwise, OptimizerSpec


def build_made_up(groups: Any, *, lr: float, betas: Any, eps: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=100 * lr, momentum=betas[0], weight_decay=weight_decay)


MADE_UP = OptimizerSpec(
    name="made_up",
    kind="made_up",
    label="SGD",
    state_label="SGD's momentum",
    description="an optimizer of a test",
    build=build_made_up,
    layout=Elementwise(("momentum_buffer",), step="none"),
    group_keys=("lr", "momentum", "weight_decay"),
    inapplicable=("adam_beta2", "adam_epsilon"),
)
