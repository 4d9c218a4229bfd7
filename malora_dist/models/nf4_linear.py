"""A frozen linear whose weight is 4-bit."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.ops.nf4 import dequantize_nf4
from malora_dist.ops.nf4_layout import nf4_bytes


class _NF4Product(torch.autograd.Function):
    """x W^T + bias, with W made from its bytes in both directions instead of being stored.

    Backward reads the bytes off the module: under ZeRO-3 they were released after forward and are gathered again by
    the time backward runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: "NF4Linear") -> Tensor:
        ctx.module = module
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return F.linear(x, module.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.module.dequantize(grads[0].dtype), None


class NF4Linear(nn.Module):
    """y = x W^T + bias with W (O, I) stored as one uint8 parameter `packed_weight` (see `ops.nf4`).

    transposed: the packed weight holds the numbers of W^T (I, O), the layout of transformers' Conv1D.
    weight_dtype: that of the weight before it was quantised, in which `weight` shows it.

    Shapes: x (..., I) -> (..., O). Only x gets a gradient.
    """

    def __init__(
        self,
        packed: Tensor,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        double_quant: bool,
        *,
        transposed: bool = False,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.double_quant = in_features, out_features, double_quant
        self.transposed, self.weight_dtype = transposed, weight_dtype
        assert packed.numel() == nf4_bytes(in_features * out_features, double_quant)
        self.packed_weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Unpack the weight (O, I)."""
        if self.transposed:
            shape = self.in_features, self.out_features
            return dequantize_nf4(self.packed_weight.data, shape, dtype, self.double_quant).T
        return dequantize_nf4(self.packed_weight.data, (self.out_features, self.in_features), dtype, self.double_quant)

    @property
    def weight(self) -> Tensor:
        """Unpack the weight (O, I) for code that reads it; what is written into it is lost."""
        return self.dequantize(self.weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _NF4Product.apply(x, self)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, double_quant={self.double_quant}"
