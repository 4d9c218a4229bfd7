"""Which modules are linear layers that an adapter can be put on, whatever their class, and how large they are."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from malora_dist.models.nf4_linear import NF4Linear

# Where transformers keeps the code of models, its own and that of folders.
MODELS = ("transformers.models.", "transformers_modules.")
# These write the product of a linear in their own way.
PLAIN = ("FalconLinear",)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the inputs and outputs of a linear layer, None for a module that is none.

    Linears are nn.Linear with its quantised subclasses, NF4Linear, and the Conv1D of GPT-2. Subclasses in which a model
    computes something else are none (routers, linears by the group), nor is the last layer of nn.MultiheadAttention,
    whose forward never runs.
    """
    if is_conv1d(module):
        return module.nx, module.nf  # type: ignore[return-value]
    if not isinstance(module, nn.Linear | NF4Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    kind = type(module)
    if kind.forward is not nn.Linear.forward and kind.__module__.startswith(MODELS) and kind.__name__ not in PLAIN:
        return None
    return module.in_features, module.out_features


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is transformers' Conv1D: y = x W + bias with W stored as (I, O)."""
    # By name: a module of another class needs no import of transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf")


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the linear that makes logits, None if the model names none."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None
