"""Training mode of an adapted model: its adapters train, its frozen base computes what it computes in evaluation."""

from torch import nn

from malora_dist.adapters.adapted_layers import mixture_layers


def train_adapters(model: nn.Module) -> None:
    """Put the adapters in training mode, and the modules of the base in evaluation mode.

    In training some families draw random numbers (Mixtral adds noise to its router's input, Phi-MoE samples experts),
    change weights in place (Gemma 3n), or give the weights of linears to a kernel (Mamba), which then leaves out the
    adapters on them. Whole models, and layers that are to be recomputed, stay in training mode: transformers recomputes
    only there, and xLSTM has a gradient only there. What those draw is dropout, and read as 0 (`models.config`).
    """
    model.train()
    adapted = {id(module) for _, layer in mixture_layers(model) for module in layer.modules()}
    for module in model.modules():
        if module is not model and id(module) not in adapted and not _is_asked(module):
            module.training = False


def _is_asked(module: nn.Module) -> bool:
    """Return whether transformers asks this module for the mode of the whole model."""
    return hasattr(module, "get_input_embeddings") or bool(getattr(module, "gradient_checkpointing", False))
