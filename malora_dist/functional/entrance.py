"""What layers make of the input they share: h = S_A drop(x) or A drop(x), and router logits on the undropped x."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.functional.dropout import keep, keep_bits


def enter(
    x_TI: Tensor,
    downs: Sequence[Tensor],
    gates: Sequence[Tensor],
    keys_T: Tensor | None = None,
    salt: int = 0,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x for the base layers, h (T, sum W) in the dtype of x, and logits (T, sum E) in fp32 or better.

    downs: S_A (D, I) or the experts' A (E, R, I), of W = D or E*R rows; gates: routers' W_g (E, I). One product serves
    all of each. Base layers must read the x returned here, and nothing else may: its gradient is the tensor to which
    the others are added, in place. With `keys_T` the downs read x dropped with probability `p` (`functional.dropout`);
    the mask is made again in backward, and neither it nor the dropped x is kept.
    """
    keys_T = keys_T if downs else None
    result: tuple[Tensor, Tensor, Tensor] = _Enter.apply(x_TI, keys_T, salt, p, len(downs), *downs, *gates)
    return result


def router_logits(x_TI: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """(T, sum E): W_g x, in fp32 (fp64 for fp64 input)."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    if not gates:
        return x_TI.new_empty(len(x_TI), 0, dtype=dtype)
    with torch.autocast(x_TI.device.type, enabled=False):
        return F.linear(x_TI.to(dtype), _stack(gates, dtype))


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that products run in under torch.autocast; itself elsewhere."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Enter(torch.autograd.Function):
    """Keeps x and the keys. Weights are read again in backward, by when ZeRO-3 has gathered them again."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, keys_T: Tensor | None, salt: int, p: float, num_downs: int, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x_TI, keys_T, *weights)
        ctx.salt, ctx.p, ctx.num_downs = salt, p, num_downs
        downs, gates = weights[:num_downs], weights[num_downs:]
        if not downs:
            h_TW = x_TI.new_empty(len(x_TI), 0)
        elif keys_T is None:
            h_TW = F.linear(x_TI, _stack(downs, x_TI.dtype))
        else:
            dropped_TI = keep(x_TI, keep_bits(keys_T, salt, x_TI.shape[1], p))
            h_TW = F.linear(dropped_TI, _stack(downs, x_TI.dtype)).div_(1 - p)
        base_TI = x_TI.view_as(x_TI)
        if not ctx.needs_input_grad[0]:
            # Else the base would compute a gradient that nobody wants.
            ctx.mark_non_differentiable(base_TI)
        return base_TI, h_TW, router_logits(x_TI, gates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, keys_T, *weights = ctx.saved_tensors
        grad_TI, grad_h_TW, grad_logits_TE = grads
        grad_logits_TE = grad_logits_TE.to(x_TI.dtype)
        need_x, need_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        if keys_T is None:
            # One product for all that read x, in each direction.
            grad_TN = torch.cat([grad_h_TW, grad_logits_TE], dim=1)
            grad_NI = grad_TN.T @ x_TI if need_weights else None
            if need_x:
                grad_TI.addmm_(grad_TN, _stack(weights, x_TI.dtype))
        else:
            downs, gates = weights[: ctx.num_downs], weights[ctx.num_downs :]
            bits = keep_bits(keys_T, ctx.salt, x_TI.shape[1], ctx.p)
            grad_h_TW = grad_h_TW / (1 - ctx.p)
            down_rows = grad_h_TW.T @ keep(x_TI, bits)
            grad_NI = torch.cat([down_rows, grad_logits_TE.T @ x_TI]) if need_weights else None
            if need_x:
                grad_TI.add_(keep(grad_h_TW @ _stack(downs, x_TI.dtype), bits))
                if gates:
                    grad_TI.addmm_(grad_logits_TE, _stack(gates, x_TI.dtype))
        return grad_TI if need_x else None, None, None, None, None, *_unstack(grad_NI, weights)


def _stack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(N, I), all rows of all weights."""
    rows = [weight.flatten(0, -2) for weight in weights]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)


def _unstack(grad_NI: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
    if grad_NI is None:
        return [None] * len(weights)
    parts = grad_NI.split([weight[..., 0].numel() for weight in weights])
    return [part.view(weight.shape).to(weight.dtype) for part, weight in zip(parts, weights, strict=True)]
