"""bitsandbytes' 4-bit linears on a CPU: after a forward in eval they keep a layout whose product has no gradient."""

from typing import Any

import torch
from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Let every such linear of a model return to the layout that has gradients, whenever a gradient will be asked for.

    bitsandbytes itself warns in backward and gives none.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and _before_forward not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before_forward)


def unpack(module: Any) -> None:
    """Return to the layout in which the weight was quantised, with its scales rounded to bfloat16."""
    state: Any = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax
        # Saving does it, but leaves scales that are not quantised in the order of the other layout.
        module.state_dict()
        if not state.nested:
            state.absmax = scales.T.reshape(-1).float()


def _before_forward(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        unpack(module)
