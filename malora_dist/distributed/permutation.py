"""The order in which tokens are sent: a row for each (token, rank that holds an expert of it), and back again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Permutation:
    """The order of N rows: by expert rank, then by token.

    rank_N, token_N: the expert rank and the token of each row.
    row_TQ: the rows of each token, in the order of ranks; N stands for none, which only follows real rows.
        Q = min(top_k, W) for W ranks.
    """

    rank_N: Tensor
    token_N: Tensor
    row_TQ: Tensor

    def permute(self, x_TD: Tensor) -> Tensor:
        """Copy tokens (T, D) to their rows (N, D). The gradient of a token is the sum over its rows, in fixed order."""
        rows_ND: Tensor = _Permute.apply(x_TD, self.token_N, self.row_TQ)
        return rows_ND

    def unpermute(self, base_TO: Tensor, rows_NO: Tensor) -> Tensor:
        """Add each token's rows (N, O) to its base (T, O), in fixed order, in fp32 at least; mirrors `permute`."""
        sums_TO: Tensor = _Unpermute.apply(base_TO, rows_NO, self.token_N, self.row_TQ)
        return sums_TO


def permutations(mask_LWT: Tensor, num_rows_L: Sequence[int], rows_per_token: int) -> tuple[Permutation, ...]:
    """Order the rows of L layers, without making the host wait for the mask.

    Args:
        mask_LWT: whether token t has a row for rank w.
        num_rows_L: how many of each layer's cells are true.
        rows_per_token: Q, the most rows that a token may have.
    """
    _, ranks, tokens = torch.nonzero_static(mask_LWT, size=sum(num_rows_L)).unbind(dim=1)
    row_LWT = (mask_LWT.flatten(1).cumsum(dim=1) - 1).view(mask_LWT.shape)
    none_L11 = mask_LWT.sum(dim=(1, 2), keepdim=True)
    row_LTW = torch.where(mask_LWT, row_LWT, none_L11).transpose(1, 2).sort(dim=2).values
    sizes = list(num_rows_L)
    of_layers = zip(ranks.split(sizes), tokens.split(sizes), row_LTW[..., :rows_per_token], strict=True)
    return tuple(Permutation(rank_N, token_N, row_TQ) for rank_N, token_N, row_TQ in of_layers)


def sum_rows(rows_ND: Tensor, row_TQ: Tensor, base_TD: Tensor | None = None) -> Tensor:
    """Add up each token's rows in the order of `row_TQ`, and the base if there is one, in fp32 at least: (T, D)."""
    dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    num_rows = len(rows_ND)
    total = rows_ND[row_TQ[:, 0]].to(dtype)
    if base_TD is not None:
        total = base_TD.to(dtype) + total
    for row_T in row_TQ.unbind(dim=1)[1:]:
        rows_TD = rows_ND[row_T.clamp(max=num_rows - 1)].to(dtype)
        total += rows_TD.masked_fill((row_T == num_rows)[:, None], 0)
    return total.to(rows_ND.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_TQ: Tensor) -> Tensor:
        ctx.save_for_backward(row_TQ)
        return x_TD[token_N]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(grad_ND, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base_TO: Tensor, rows_NO: Tensor, token_N: Tensor, row_TQ: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        return sum_rows(rows_NO, row_TQ, base_TO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (token_N,) = ctx.saved_tensors
        return grad_TO, grad_TO[token_N], None, None
