"""DoRA (arXiv 2402.09353): the adapted weight W + s B A gets a trained norm for each output."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.models.bitsandbytes_cpu import unpack
from malora_dist.models.linears import is_conv1d
from malora_dist.models.nf4_linear import NF4Linear
from malora_dist.ops.partitioned import is_partitioned

ROWS = 1024


class DoRALayer(nn.Module):
    """y = base + g (W h + s B A h) - W h  with  g = m / ||W + s B A||, a norm for each row, which has no gradient.

    h is the adapter's input: where dropout changed it, base = W x + bias and W h differ, as in PEFT. m is `magnitude`
    (O,), at first ||W||, so that y = base.

    The norm is ||W||^2 + 2 s <B, W A^T> + s^2 <B, B A A^T> by rows: no (O, I) matrix is made, and W A^T is the base
    layer applied to the rows of A. So the base's weight is read inside its own forward only, where ZeRO-3 has gathered
    it. ||W||^2 is measured once, on the weight as the base computes with it (4-bit: after unpacking); no file holds it.
    """

    base_squares: Tensor

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(torch.empty(out_features, dtype=torch.float32))
        self.register_buffer("base_squares", torch.empty(out_features, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def measure(self, base_layer: Any) -> None:
        """Set ||W||^2 (fp32, or fp64 for an fp64 base) from a base layer whose weight is whole."""
        weight_OI = _weight(base_layer)
        device = self.magnitude.device
        if weight_OI is None:
            self.base_squares = _squares_by_forward(base_layer, len(self.magnitude), device)
        else:
            wide = torch.promote_types(weight_OI.dtype, torch.float32)
            self.base_squares = weight_OI.to(wide).square().sum(dim=1).to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "DoRALayer":
        """Move or cast, but never round ||W||^2: a norm is a difference of it."""
        squares_O = self.base_squares
        super()._apply(fn, recurse)
        moved_O = self.base_squares
        if moved_O.dtype != torch.promote_types(moved_O.dtype, squares_O.dtype):
            self.base_squares = squares_O.to(moved_O.device)
        return self

    def forward(
        self, base_layer: Any, base_TO: Tensor, h_TI: Tensor, A_ERI: Tensor, B_EOR: Tensor, scaling: float, same: bool
    ) -> Tensor:
        """Compute the layer's output (T, O).

        Args:
            base_layer: the frozen linear.
            base_TO: its output.
            h_TI: what the expert reads.
            A_ERI, B_EOR: the one expert, in the dtype of h.
            scaling: s.
            same: whether h is the very input of the base.
        """
        norm_O, bias_O = self._norm_and_bias(base_layer, A_ERI[0].detach(), B_EOR[0].detach() * scaling)
        plain_TO = (base_TO if same else base_layer(h_TI)) - bias_O
        z_TR = F.linear(h_TI, A_ERI[0])
        adapted_TO = torch.addmm(plain_TO, z_TR, B_EOR[0].T, alpha=scaling)
        return base_TO + ((self.magnitude / norm_O).to(base_TO.dtype) * adapted_TO - plain_TO)

    def _norm_and_bias(self, base_layer: Any, A_RI: Tensor, B_OR: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ||W + B A|| (O,) without a gradient, and the base's bias (O,), its output for a row of zeros."""
        images = base_layer(torch.cat([A_RI, torch.zeros_like(A_RI[:1])]))
        bias_O = images[-1]
        A, B, WA_RO = (t.detach().to(self.base_squares.dtype) for t in (A_RI, B_OR, images[:-1] - bias_O))
        squares_O = self.base_squares + 2 * (B * WA_RO.T).sum(dim=1) + (B * (B @ (A @ A.T))).sum(dim=1)
        # A row of zeros has magnitude 0, and no output either way.
        return squares_O.clamp(min=torch.finfo(squares_O.dtype).tiny).sqrt(), bias_O


def _weight(base_layer: Any) -> Tensor | None:
    """Return the weight (O, I) as the layer computes with it, None where only the layer itself can unpack it."""
    if isinstance(base_layer, NF4Linear):
        return base_layer.dequantize(torch.float32)
    unpack(base_layer)
    weight: Tensor = base_layer.weight
    if is_partitioned(weight) and not weight.numel():
        raise ConfigError(
            "method='dora' measures the base's weights, which ZeRO-3 keeps in parts: inject_adapters(..., "
            "whole=malora_dist.distributed.zero3.gathered)"
        )
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        unpacked: Tensor = dequantize_4bit(weight.data, state)
        return unpacked.view(state.shape)
    if weight.is_floating_point() and weight.itemsize < 2:
        raise ConfigError(
            f"method='dora' measures the base's weights, and a {type(base_layer).__name__} keeps them in 8 bits "
            f"({str(weight.dtype).removeprefix('torch.')}) with scales of its own: take another method, or load the "
            "base in another format"
        )
    if weight.is_meta or not weight.is_floating_point() or weight.dim() != 2:
        return None
    return weight.T if is_conv1d(base_layer) else weight


def _squares_by_forward(base_layer: Any, out_features: int, device: torch.device) -> Tensor:
    """Compute ||W||^2 (O,) from the layer's outputs for the rows of the identity."""
    squares_O = torch.zeros(out_features, device=device)
    bias_O = base_layer(torch.zeros(1, base_layer.in_features, device=device))[0]
    for columns in torch.arange(base_layer.in_features, device=device).split(ROWS):
        rows = F.one_hot(columns, base_layer.in_features).float()
        squares_O += (base_layer(rows) - bias_O).float().square().sum(dim=0)
    return squares_O
