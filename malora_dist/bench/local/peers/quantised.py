"""A model's linears in 4 bits, by our layer or by bitsandbytes' own; the head stays as it is."""

from collections.abc import Callable

from torch import nn

from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.nf4 import quantize_nf4


def with_nf4(model: nn.Module) -> nn.Module:
    """Replace every linear but the head by an NF4Linear, in place."""

    def ours(linear: nn.Linear) -> nn.Module:
        packed = quantize_nf4(linear.weight)
        return NF4Linear(packed, linear.bias, linear.in_features, linear.out_features, double_quant=False)

    return _replace_linears(model, ours)


def with_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace every linear but the head by bitsandbytes' Linear4bit, in place, as transformers loads a 4-bit model."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    def theirs(linear: nn.Linear) -> nn.Module:
        sizes, dtype, device = (linear.in_features, linear.out_features), linear.weight.dtype, linear.weight.device
        kind = {"quant_type": "nf4", "compress_statistics": False}
        made = Linear4bit(*sizes, bias=linear.bias is not None, compute_dtype=dtype, device="meta", **kind)
        made.weight = Params4bit(linear.weight.data, requires_grad=False, blocksize=64, **kind)
        made.bias = linear.bias
        quantised: nn.Module = made.to(device)
        return quantised

    _replace_linears(model, theirs)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks the model, not the layer
    return model


def _replace_linears(model: nn.Module, made_of: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    head = getattr(model, "lm_head", None)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made_of(module))
    return model
