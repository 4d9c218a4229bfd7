"""AdamW of torch, whose two moments are fp32."""

from typing import TYPE_CHECKING, Any

from malora_dist.optimizers.spec import Elementwise, OptimizerSpec

if TYPE_CHECKING:
    from torch.optim import Optimizer


def build(groups: list[dict[str, Any]], **settings: Any) -> "Optimizer":
    """Make torch's AdamW with its fused kernel."""
    import torch

    return torch.optim.AdamW(groups, fused=True, **settings)


ADAMW = OptimizerSpec(
    name="adamw_torch",
    aliases=("adamw_torch_fused",),
    kind="AdamW",
    label="AdamW",
    state_label="AdamW's moments",
    description="two fp32 moments",
    build=build,
    layout=Elementwise(("exp_avg", "exp_avg_sq")),
    group_keys=("lr", "betas", "eps", "weight_decay"),
)
