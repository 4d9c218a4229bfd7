"""The projections of a layer's input: h = S_A drop(x) or A drop(x), and router logits of the undropped x."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora_dist.ops.dropout import add_dropped_, drop
from malora_dist.ops.products import WeightCopies, scaled_product
from malora_dist.ops.task_gradients import TaskGradients


def project(
    x_TI: Tensor,
    downs: Sequence[Tensor],
    gates: Sequence[Tensor],
    keys_T: Tensor | None = None,
    salt: int = 0,
    p: float = 0.0,
    copies: WeightCopies | None = None,
    narrow: bool = False,
    tasks: TaskGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project x by all down-projections in one product, and by all routers in another.

    Args:
        x_TI: the layers' input.
        downs: S_A (D, I) or the experts' A (E, R, I), of W = D or E*R rows.
        gates: routers' W_g (E, I).
        keys_T: with keys, the downs read x dropped (`ops.dropout`); the mask is made again in backward, and neither it
            nor the dropped x is kept.
        salt, p: of the dropout.
        copies: where copies of weights in the dtype of x are kept.
        narrow: routers multiply in the dtype of x.
        tasks: also gets the gradients of the downs by task.

    Returns:
        x for the base layers, h (T, sum W) in the dtype of x, and logits (T, sum E) in fp32 or better. Base layers must
        read the x returned here, and nothing else may: its gradient is the tensor to which the others are added, in
        place.
    """
    keys_T = keys_T if downs else None
    result: tuple[Tensor, Tensor, Tensor] = _Project.apply(
        x_TI, keys_T, salt, p, copies, narrow, tasks, len(downs), *downs, *gates
    )
    return result


def router_logits(x_TI: Tensor, gates: Sequence[Tensor], narrow: bool = False) -> Tensor:
    """Compute W_g x, (T, sum E), in fp32 (fp64 for fp64 input); with `narrow` the product is in the dtype of x."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    if not gates:
        return x_TI.new_empty(len(x_TI), 0, dtype=dtype)
    used = x_TI.dtype if narrow else dtype
    with torch.autocast(x_TI.device.type, enabled=False):
        return F.linear(x_TI.to(used), _stack(gates, used)).to(dtype)


def inner_router_logits(h_TW: Tensor, gates: Sequence[Tensor], narrow: bool = False) -> Tensor:
    """Compute W_g h of L layers, (L, T, E), each router on its own h (T, D) of h_TW, in the dtypes of `router_logits`.

    Args:
        h_TW: what the experts of L layers read, side by side, W = L D.
        gates: the layers' routers, (E, D).
        narrow: as for `router_logits`.
    """
    dtype = torch.promote_types(h_TW.dtype, torch.float32)
    used = h_TW.dtype if narrow else dtype
    h_LTD = h_TW.to(used).unflatten(1, (len(gates), -1)).transpose(0, 1)
    with torch.autocast(h_TW.device.type, enabled=False):
        return torch.bmm(h_LTD, torch.stack(list(gates)).to(used).mT).to(dtype)


def autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that products run in under torch.autocast; itself elsewhere."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Project(torch.autograd.Function):
    """Keeps x and the keys. Weights are read again in backward, by when ZeRO-3 has gathered them again."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        keys_T: Tensor | None,
        salt: int,
        p: float,
        copies: WeightCopies | None,
        narrow: bool,
        tasks: TaskGradients | None,
        num_downs: int,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x_TI, keys_T, *weights)
        ctx.salt, ctx.p, ctx.copies, ctx.num_downs, ctx.tasks = salt, p, copies, num_downs, tasks
        if not num_downs:
            h_TW = x_TI.new_empty(len(x_TI), 0)
        else:
            down_WI = _rows(weights, slice(num_downs), x_TI.dtype, copies)
            read_TI = x_TI if keys_T is None else drop(x_TI, keys_T, salt, p)
            h_TW = scaled_product(read_TI, down_WI.T, 1.0 if keys_T is None else 1 / (1 - p))
        base_TI = x_TI.view_as(x_TI)
        if not ctx.needs_input_grad[0]:
            # Else the base would compute a gradient that nobody wants.
            ctx.mark_non_differentiable(base_TI)
        return base_TI, h_TW, router_logits(x_TI, weights[num_downs:], narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, keys_T, *weights = ctx.saved_tensors
        grad_TI, grad_h_TW, grad_logits_TE = grads
        need_x, need_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[8:])
        # What reads x undropped shares one product in each direction.
        first = 0 if keys_T is None else ctx.num_downs
        parts = [grad_h_TW] if first == 0 and ctx.num_downs else []
        parts += [grad_logits_TE.to(x_TI.dtype)] if len(weights) > ctx.num_downs else []
        grad_weights: list[Tensor | None] = [] if need_weights else [None] * len(weights)
        if keys_T is not None:
            dropped = _dropped_gradients(ctx, x_TI, keys_T, weights, grad_h_TW, grad_TI)
            grad_weights = [*dropped, *grad_weights] if need_weights else grad_weights
        if parts:
            grad_TN = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if need_x:
                grad_TI.addmm_(grad_TN, _rows(weights, slice(first, None), x_TI.dtype, ctx.copies))
            if need_weights and first == 0 and ctx.tasks is not None and ctx.num_downs:
                grad_weights += _down_gradients(ctx, x_TI, weights, grad_h_TW, 1.0)
                grad_weights += _unstack(parts[-1].T @ x_TI, weights[ctx.num_downs :]) if len(parts) > 1 else []
            elif need_weights:
                grad_weights += _unstack(grad_TN.T @ x_TI, weights[first:])
        return grad_TI if need_x else None, None, None, None, None, None, None, None, *grad_weights


def _dropped_gradients(
    ctx: Any, x_TI: Tensor, keys_T: Tensor, weights: Sequence[Tensor], grad_h_TW: Tensor, grad_TI: Tensor
) -> list[Tensor]:
    """Compute the gradients of the downs, which read the dropped x, and add that of x to `grad_TI`."""
    downs, alpha = slice(ctx.num_downs), 1 / (1 - ctx.p)
    grads: list[Tensor] = []
    if ctx.needs_input_grad[0]:
        part_TI = scaled_product(grad_h_TW, _rows(weights, downs, x_TI.dtype, ctx.copies), alpha)
        add_dropped_(grad_TI, part_TI, keys_T, ctx.salt, ctx.p)
    if any(ctx.needs_input_grad[8:]):
        read_TI = drop(x_TI, keys_T, ctx.salt, ctx.p)
        grads = _down_gradients(ctx, read_TI, weights, grad_h_TW, alpha)
    return grads


def _down_gradients(
    ctx: Any, read_TI: Tensor, weights: Sequence[Tensor], grad_h_TW: Tensor, alpha: float
) -> list[Tensor]:
    """Compute the gradients of the downs, which read `read_TI` times alpha; by task where they are asked for."""
    if ctx.tasks is None:
        grad_WI = scaled_product(grad_h_TW.T, read_TI, alpha)
    else:
        grad_WI = ctx.tasks.add(grad_h_TW, read_TI, alpha)
    return _unstack(grad_WI, weights[: ctx.num_downs])


def _rows(weights: Sequence[Tensor], part: slice, dtype: torch.dtype, copies: WeightCopies | None) -> Tensor:
    """Return all rows (N, I) of a part of weights in `dtype`. Kept are those of all where their dtype is another."""
    if copies is None or weights[0].dtype == dtype:
        return _stack(weights[part], dtype)
    rows_NI = copies.get("rows", dtype, lambda: _stack(weights, dtype))
    edges = [0, *accumulate(weight.numel() // weight.shape[-1] for weight in weights)]
    start, stop, _ = part.indices(len(weights))
    return rows_NI[edges[start] : edges[stop]]


def _stack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return all rows of all weights, (N, I)."""
    rows = [weight.flatten(0, -2) for weight in weights]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(dtype)


def _unstack(grad_NI: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of each weight, a view of that of all their rows."""
    parts = grad_NI.to(weights[0].dtype).split([weight.numel() // weight.shape[-1] for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
