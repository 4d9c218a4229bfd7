"""The varlen kernel that PyTorch has for CUDA alone, for this CPU, under the kernel's own name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _probabilities(q: Tensor, k: Tensor, starts: Tensor, longest: int, causal: bool, options: dict[str, Any]) -> Tensor:
    """(H, T, T); nobody here attends without causality."""
    lengths, T = starts.diff(), len(q)
    assert starts.dtype == torch.int32 and longest == lengths.max() and lengths.sum() == T
    left, right = options.get("window_size_left"), options.get("window_size_right")
    assert causal or right == 0
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    seen = (sample[:, None] == sample) & (distance >= 0) & (distance <= (T if left in (None, -1) else left))
    scores = torch.einsum("thd,shd->hts", q, _for_all_heads(k, q)) * options["scale"]
    return scores.float().masked_fill(~seen, float("-inf")).softmax(dim=-1)


def _for_all_heads(states: Tensor, q: Tensor) -> Tensor:
    return states.repeat_interleave(q.shape[1] // states.shape[1], dim=1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, longest: int, __: int, p: float, causal: bool,
    ___: bool, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert p == 0
    P = _probabilities(q, k, starts, longest, causal, options).to(q.dtype)
    logsumexp = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    return torch.einsum("hts,shd->thd", P, _for_all_heads(v, q)), logsumexp, *(q.new_empty(0) for _ in range(3))


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Tensor, __: Tensor, starts: Tensor, ___: Tensor,
    longest: int, ____: int, p: float, causal: bool, *_____: Any, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    P, (T, G, D) = _probabilities(q, k, starts, longest, causal, options).to(q.dtype), k.shape
    slope = torch.einsum("thd,shd->hts", grad, _for_all_heads(v, q))
    slope = P * (slope - (P * slope).sum(dim=-1, keepdim=True)) * options["scale"]
    shared = [torch.einsum("hts,thd->shd", slope, q), torch.einsum("hts,thd->shd", P, grad)]
    dk, dv = (gradient.view(T, G, -1, D).sum(dim=2) for gradient in shared)
    return torch.einsum("hts,shd->thd", slope, _for_all_heads(k, q)), dk, dv


@contextmanager
def kernel_on_cpu() -> Iterator[None]:
    """Inside, `torch.nn.attention.varlen` works on a CPU, and in fp32."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
