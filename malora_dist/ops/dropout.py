"""Dropout whose mask is a function of (seed, step, sample, position, layer input), not of a process's generator.

So a run gives the same numbers on any number of processes and for any packing of samples into rows, layers that read
the same input drop the same numbers, and backward makes the mask again instead of storing it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from malora_dist.ops.operators import operator


def _xor_shift(bits: Tensor, shift: int) -> Tensor:
    # int32 shifts copy the sign bit in; the mask makes the shift logical, without which half of the bits are lost.
    return bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1))


def _mix(bits: Tensor) -> Tensor:
    """Multiply and xor-shift on int32, in place: every input bit changes about half of the output bits."""
    _xor_shift(bits, 16).mul_(0x7FEB352D)
    _xor_shift(bits, 15).mul_(-0x7B935975)
    return _xor_shift(bits, 16)


def token_keys(seed: int, step: int, sample_ids_T: Tensor, positions_T: Tensor) -> Tensor:
    """Compute one key per token, (T,) int32, from its sample's global id and its position in that sample."""
    keys = sample_ids_T.to(torch.int32) * 0x01000193 + seed
    keys = _mix(keys).add_(positions_T.to(torch.int32)).mul_(0x01000193)
    return _mix(keys.add_(step))


def mask_limit(p: float) -> int:
    """Return the limit of numbers of 15 bits: those below it keep."""
    return min(round((1 - p) * 2**15), 2**15 - 1)


def dropout_mask(keys_T: Tensor, salt: int, num_features: int, p: float) -> Tensor:
    """Compute the mask (T, I) as int16: all bits set with probability 1 - p (in steps of 2^-15), which keeps a number.

    Args:
        keys_T: `token_keys`.
        salt: tells layer inputs apart.
        num_features: I.
        p: probability that a number is dropped.
    """
    # One 32-bit number decides over two neighbouring features: drawing them is most of the cost.
    columns = _mix(torch.arange((num_features + 1) // 2, dtype=torch.int32, device=keys_T.device))
    bits = _mix((keys_T + salt)[:, None] + columns).view(torch.int16)[:, :num_features]
    return bits.bitwise_and_(0x7FFF).sub_(mask_limit(p)).bitwise_right_shift_(15)


def _drop(x_TI: Tensor, keys_T: Tensor, salt: int, p: float) -> Tensor:
    # By bits: booleans are several times as slow for 16-bit numbers.
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x_TI.itemsize]
    mask = dropout_mask(keys_T, salt, x_TI.shape[1], p)
    return x_TI.contiguous().view(words).bitwise_and(mask.to(words)).view(x_TI.dtype)


def _add_dropped(total_TI: Tensor, x_TI: Tensor, keys_T: Tensor, salt: int, p: float) -> None:
    total_TI.add_(_drop(x_TI, keys_T, salt, p))


def _drop_kernel(x_TI: Tensor, keys_T: Tensor, salt: int, p: float) -> Tensor:
    from malora_dist.ops.dropout_kernel import launch

    return launch(x_TI, x_TI.new_empty(x_TI.shape), keys_T, salt, mask_limit(p), add=False)


def _add_dropped_kernel(total_TI: Tensor, x_TI: Tensor, keys_T: Tensor, salt: int, p: float) -> None:
    from malora_dist.ops.dropout_kernel import launch

    if total_TI.stride(1) != 1:
        # The gradient of a transposed x is transposed, too.
        _add_dropped(total_TI, x_TI, keys_T, salt, p)
        return
    launch(x_TI, total_TI, keys_T, salt, mask_limit(p), add=True)


# x (T, I) with 0 where `dropout_mask` is 0, not rescaled.
drop = operator(
    "drop(Tensor x, Tensor keys, int salt, float p) -> Tensor",
    plain=_drop,
    kernel=_drop_kernel,
    fake=lambda x, keys, salt, p: x.new_empty(x.shape),
)

# total += drop(x), in place.
add_dropped_ = operator(
    "add_dropped_(Tensor(a!) total, Tensor x, Tensor keys, int salt, float p) -> ()",
    plain=_add_dropped,
    kernel=_add_dropped_kernel,
    fake=lambda total, x, keys, salt, p: None,
)


class _KeyedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, keys_T: Tensor, salt: int, p: float) -> Tensor:
        ctx.save_for_backward(keys_T)
        ctx.salt, ctx.p = salt, p
        dropped_TI: Tensor = drop(x_TI, keys_T, salt, p)
        return dropped_TI.div_(1 - p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (keys_T,) = ctx.saved_tensors
        return drop(grads[0], keys_T, ctx.salt, ctx.p).div_(1 - ctx.p), None, None, None


def keyed_dropout(x_TI: Tensor, keys_T: Tensor, salt: int, p: float) -> Tensor:
    """Drop each number of x with probability p, and divide the rest by 1 - p."""
    dropped: Tensor = _KeyedDropout.apply(x_TI, keys_T, salt, p)
    return dropped
