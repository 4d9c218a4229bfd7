"""Mixtures of LoRA experts as mixture-of-experts code usually computes them: each expert sees its own tokens only.

`sorted` follows FastMoE (arXiv 2103.13262): copy each token's row once for each of its experts, in the order of the
experts; multiply every expert's rows by its matrices; put the rows back and add them up by the gates. `looped` does as
transformers' Mixtral does: find each expert's tokens, and add its weighted output to the sum. Which is faster depends
on the size. For MALoRA the rows are S_A x, as in the paper. Here to be measured against; nothing is trained with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from malora_dist.adapters.adapted_layers import mixture_layers
from malora_dist.adapters.layer import MixtureLinear
from malora_dist.adapters.methods import MixtureSpec
from malora_dist.ops.routing import Routing


class DispatchedLinear(nn.Module):
    """y = base(x) + s * sum_{t in top-k} g_t B_t C_t h of a MixtureLinear, on its weights in the base's dtype.

    Shapes: x (..., I) -> (..., O). `routing` keeps the last forward's decision.
    """

    shared_A: nn.Parameter | None
    routing: Routing | None

    def __init__(
        self, layer: MixtureLinear, spec: MixtureSpec, dtype: torch.dtype, *, dropout: float = 0.0, looped: bool = False
    ) -> None:
        super().__init__()
        factors = {name: nn.Parameter(factor.detach().to(dtype)) for name, factor in layer.factors()}
        self.base_layer = layer.base_layer
        self.gate, self.B = factors["gate"], factors["B"]
        self.register_parameter("shared_A", factors.get("shared_A"))
        self.down = factors["P"] if "P" in factors else factors["A"]
        self.top_k, self.scaling, self.looped = spec.top_k, spec.scaling, looped
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.routing = None

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        probs_TE = F.linear(x_TI, self.gate).softmax(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        gates_TK, ids_TK = probs_TE.topk(self.top_k)
        self.routing = Routing(gates_TK, ids_TK, probs_TE)
        h_TD: Tensor = self.dropout(x_TI)
        if self.shared_A is not None:
            h_TD = F.linear(h_TD, self.shared_A)
        y: Tensor = self.base_layer(x)
        experts = self._looped if self.looped else self._sorted
        return y + experts(h_TD, ids_TK, (gates_TK * self.scaling).to(h_TD.dtype)).view(y.shape)

    def _looped(self, h_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        out_TO = h_TD.new_zeros(len(h_TD), self.B.shape[1])
        for expert, (down, B) in enumerate(zip(self.down.unbind(), self.B.unbind(), strict=True)):
            token, place = (ids_TK == expert).nonzero(as_tuple=True)
            out_TO.index_add_(0, token, F.linear(F.linear(h_TD[token], down), B) * gates_TK[token, place, None])
        return out_TO

    def _sorted(self, h_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        T, K = ids_TK.shape
        order_N = ids_TK.flatten().argsort(stable=True)
        counts = torch.bincount(ids_TK.flatten(), minlength=len(self.B)).tolist()
        rows_ND = h_TD.index_select(0, order_N // K)
        experts = zip(rows_ND.split(counts), self.down.unbind(), self.B.unbind(), strict=True)
        sorted_NO = torch.cat([F.linear(F.linear(rows, down), B) for rows, down, B in experts])
        # In place on a fresh tensor, so that backward is one more copy of rows and no sum.
        rows_NO = torch.zeros_like(sorted_NO, requires_grad=False).index_copy_(0, order_N, sorted_NO)
        return torch.bmm(gates_TK[:, None], rows_NO.view(T, K, -1)).squeeze(1)


def dispatch_adapters(
    model: nn.Module, spec: MixtureSpec, dtype: torch.dtype, *, dropout: float = 0.0, looped: bool = False
) -> None:
    """Replace every MixtureLinear of the model by a DispatchedLinear on its weights in `dtype`, in place."""
    for name, layer in list(mixture_layers(model)):
        parent, _, leaf = name.rpartition(".")
        dispatched = DispatchedLinear(layer, spec, dtype, dropout=dropout, looped=looped)
        setattr(model.get_submodule(parent), leaf, dispatched)
