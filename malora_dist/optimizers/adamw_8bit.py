"""AdamW of bitsandbytes, whose moments are 8-bit codes with one fp32 scale for each block of 256 elements.

A checkpoint holds the moments as numbers, and beside each number the scale of its block. Where the blocks of the
resumed run are those of the saved one, number and scale give back the same code, bit for bit; elsewhere the numbers are
quantised again with the largest of their new block as the scale.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from malora_dist.optimizers.spec import FP32, OptimizerSpec, Shape

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

BLOCK = 256
# bitsandbytes keeps the moments of tensors with fewer elements in fp32.
SMALLEST = 4096
MOMENTS = ("exp_avg", "exp_avg_sq")
# Of bitsandbytes: the moments' names, their scales', and the code books, with the names of those in the optimizer.
STATES = (("state1", "absmax1", "qmap1", "dynamic"), ("state2", "absmax2", "qmap2", "udynamic"))


def build(groups: list[dict[str, Any]], **settings: Any) -> "Optimizer":
    """Make bitsandbytes' AdamW8bit."""
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(groups, min_8bit_size=SMALLEST, **settings)
    return optimizer


class Blockwise8bit:
    """The two moments of bitsandbytes' 8-bit optimizers. See the module."""

    elementwise: ClassVar[bool] = True

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        return dict.fromkeys((*MOMENTS, *(f"{moment}_absmax" for moment in MOMENTS)), shape)

    def read(self, state: Mapping[str, Any], start: int, stop: int) -> "dict[str, Tensor]":
        import torch

        found = {}
        for moment, (codes, scales, book, _) in zip(MOMENTS, STATES, strict=True):
            own = state[codes].detach().reshape(-1)[start:stop]
            if codes_are_fp32(state):
                found[moment], found[f"{moment}_absmax"] = own, torch.zeros_like(own)
                continue
            blocks = torch.arange(start, stop, device=own.device) // BLOCK
            absmax = state[scales][blocks]
            found[moment], found[f"{moment}_absmax"] = state[book][own.long()] * absmax, absmax
        return found

    def write(self, optimizer: Any, tensor: "Tensor", step: int, values: "dict[str, Tensor]") -> None:
        state: dict[str, Any] = {"step": step}
        for moment, (codes, scales, book, name) in zip(MOMENTS, STATES, strict=True):
            if tensor.numel() < SMALLEST:
                state[codes] = values[moment]
                continue
            optimizer.name2qmap[name] = optimizer.name2qmap[name].to(tensor.device)
            state[book] = optimizer.name2qmap[name]
            flat = values[moment].reshape(-1), values[f"{moment}_absmax"].reshape(-1)
            found, state[scales] = quantise(*flat, state[book])
            state[codes] = found.view(tensor.shape)
        optimizer.state[tensor] = state

    def num_bytes(self, shape: Shape) -> int:
        """Return the bytes of the state of a tensor of `shape`, without the two code books, 2 KiB a process."""
        numel = math.prod(shape)
        if numel < SMALLEST:
            return len(MOMENTS) * FP32 * numel
        return len(MOMENTS) * (numel + FP32 * math.ceil(numel / BLOCK))


def codes_are_fp32(state: Mapping[str, Any]) -> bool:
    """Return whether a tensor was too small for bitsandbytes to quantise its moments."""
    return "absmax1" not in state


def quantise(value_N: "Tensor", absmax_N: "Tensor", book: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return the codes (N,), uint8, and the scale of each block of 256, fp32, of N numbers.

    Args:
        value_N: the numbers, fp32.
        absmax_N: the scale that each number was quantised with before; 0 if it was not, or is padding.
        book: the 256 values of the codes in ascending order.
    """
    import torch

    N = len(value_N)
    fill = -N % BLOCK
    value_BK, absmax_BK = (torch.nn.functional.pad(t, (0, fill)).view(-1, BLOCK) for t in (value_N, absmax_N))
    scale_B = absmax_BK.amax(1)
    # Numbers of several old blocks, or that were not quantised, get a scale of their own; zeros fit any scale.
    other_BK = (absmax_BK != scale_B[:, None]) & ((value_BK != 0) | (absmax_BK != 0))
    fresh_B = other_BK.any(1) | (scale_B == 0)
    scale_B = torch.where(fresh_B, value_BK.abs().amax(1), scale_B)
    share_BK = value_BK / torch.where(scale_B == 0, 1, scale_B)[:, None]
    codes_BK = torch.bucketize(share_BK, (book[1:] + book[:-1]) / 2)
    return codes_BK.to(torch.uint8).view(-1)[:N].contiguous(), scale_B


ADAMW_8BIT = OptimizerSpec(
    name="adamw_8bit",
    aliases=("adamw_bnb_8bit",),
    kind="adamw_8bit",
    label="8-bit AdamW",
    state_label="8-bit AdamW's moments",
    description="AdamW of bitsandbytes with moments of 8 bits",
    build=build,
    layout=Blockwise8bit(),
    group_keys=("lr", "betas", "eps", "weight_decay"),
    devices=("cpu", "cuda"),
)
