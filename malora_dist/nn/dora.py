"""DoRA (arXiv 2402.09353): the adapted weight W + s B A gets a trained norm for each output."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.nn.nf4_linear import NF4Linear


class Magnitude(nn.Module):
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
        """Set ||W||^2 (fp32, or fp64 for an fp64 base) from a base layer whose weight is whole and in memory."""
        weight = base_layer.dequantize(torch.float32) if isinstance(base_layer, NF4Linear) else base_layer.weight
        self.base_squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(dim=1)

    def forward(
        self, base_layer: Any, base_TO: Tensor, h_TI: Tensor, A_ERI: Tensor, B_EOR: Tensor, scaling: float, same: bool
    ) -> Tensor:
        """The layer's output (T, O) from the base's, the one expert, and whether h is the very input of the base."""
        norm_O, bias_O = self._norm_and_bias(base_layer, A_ERI[0].detach(), B_EOR[0].detach() * scaling)
        plain_TO = (base_TO if same else base_layer(h_TI)) - bias_O
        z_TR = F.linear(h_TI, A_ERI[0])
        adapted_TO = torch.addmm(plain_TO, z_TR, B_EOR[0].T, alpha=scaling)
        return base_TO + ((self.magnitude / norm_O).to(base_TO.dtype) * adapted_TO - plain_TO)

    def _norm_and_bias(self, base_layer: Any, A_RI: Tensor, B_OR: Tensor) -> tuple[Tensor, Tensor]:
        """||W + B A|| (O,) without a gradient, and the base's bias (O,): what it makes of a row of zeros."""
        images = base_layer(torch.cat([A_RI, torch.zeros_like(A_RI[:1])]))
        bias_O = images[-1]
        A, B, WA_RO = (t.detach().to(self.base_squares.dtype) for t in (A_RI, B_OR, images[:-1] - bias_O))
        squares_O = self.base_squares + 2 * (B * WA_RO.T).sum(dim=1) + (B * (B @ (A @ A.T))).sum(dim=1)
        # A row of zeros has magnitude 0, and no output either way.
        return squares_O.clamp(min=torch.finfo(squares_O.dtype).tiny).sqrt(), bias_O
