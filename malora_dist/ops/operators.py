"""Operators of the namespace `malora`: one kernel each where Triton can run, plain PyTorch everywhere else.

An operator is one call for whatever watches PyTorch's dispatcher (`torch.compile`, profilers, counters of launches),
on every device. Operators have no gradient of their own: they are called inside of autograd Functions.
"""

from collections.abc import Callable
from typing import Any

import torch

from malora_dist.ops.devices import triton_ready

NAMESPACE = "malora"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(
    schema: str, plain: Callable[..., Any], kernel: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define `malora::<schema>` and return it.

    `kernel` runs where Triton does, on the device of the first argument, and `plain` elsewhere; both take the same
    arguments and give the same numbers, to rounding. `fake` makes the result's shapes and dtypes alone.
    """

    def run(first: torch.Tensor, *others: Any) -> Any:
        if not triton_ready(first.device):
            return plain(first, *others)
        with torch.cuda.device_of(first):
            return kernel(first, *others)

    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    defined: Callable[..., Any] = getattr(torch.ops.malora, name).default
    return defined


def compute_type(dtype: torch.dtype) -> Any:
    """Return the type in which kernels compute on numbers of `dtype`: Triton's fp32, or fp64 for fp64."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
