"""Stage attention: what it costs to keep packed samples apart, by masks, causal attention and varlen attention."""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.measure import DEVICE, GPU, kernels, milliseconds
from benchmarks.gpu.verdicts import Verdicts

T, H, D = (4096, 32, 128) if GPU else (128, 4, 16)
LENGTH = T // 16
DTYPE = torch.bfloat16


def inputs(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3)]


def timed(forward: Callable[[], Tensor]) -> str:
    """Time forward and both ways, what forward keeps, and the two longest kernels."""

    def both() -> None:
        y = forward()
        y.backward(torch.ones_like(y))

    names = ", ".join(row[0].split("<")[0][:50] for row in kernels(both).longest[:2])
    ways = f"forward {milliseconds(forward):.3f} ms, both {milliseconds(both):.3f} ms"
    return f"{ways}, keeps {kept_mib(forward):.0f} MiB; {names}"


def kept_mib(forward: Callable[[], Tensor]) -> float:
    if not GPU:
        return 0.0
    before = torch.cuda.memory_allocated()
    y = forward()
    kept = (torch.cuda.memory_allocated() - before) / 2**20
    del y
    return kept


def masked(mask: Tensor | None) -> Callable[[], Tensor]:
    q, k, v = inputs(1, H, T, D)
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def packed_masks() -> tuple[Tensor, Tensor]:
    """(1, 1, T, T): which token sees which, as booleans and as numbers to add to the scores."""
    sample, place = torch.arange(T, device=DEVICE) // LENGTH, torch.arange(T, device=DEVICE)
    seen = ((sample[:, None] == sample) & (place[:, None] >= place))[None, None]
    return seen, torch.zeros(seen.shape, device=DEVICE, dtype=DTYPE).masked_fill_(~seen, float("-inf"))


def varlen(length: int) -> Callable[[], Tensor]:
    from malora_dist.models.packed_attention import torch_varlen

    q, k, v = inputs(T, H, D)
    starts = torch.arange(0, T + 1, length, device=DEVICE, dtype=torch.int32)
    return lambda: torch_varlen(q, k, v, starts, length, D**-0.5, None)


def timed_varlen(length: int) -> str:
    return timed(varlen(length))


def main() -> int:
    verdicts = Verdicts()
    seen, added = packed_masks()
    verdicts.log(f"{T} tokens, {H} heads of {D}, bf16; samples of {LENGTH}")
    verdicts.attempt("a mask of booleans", lambda: timed(masked(seen)))
    verdicts.attempt("the same mask, added", lambda: timed(masked(added)))
    verdicts.attempt("causal over the whole row (other numbers)", lambda: timed(masked(None)))
    for length in (LENGTH, T // 4) if GPU else ():
        verdicts.attempt(f"varlen, samples of {length}", partial(timed_varlen, length))
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
