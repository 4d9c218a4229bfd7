"""Collectives of tensors of the device, as NCCL takes them; the group's own backend carries them, on the host."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from malora_dist.bench.strict.rules import OnDevice, mapped, tensors_of


def check_collective(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], host_groups: Sequence[Any], on_device: OnDevice
) -> bool:
    """Return whether the group is one for host tensors, as gloo's beside NCCL's.

    Raises RuntimeError for tensors of the other place, and ValueError for a tensor that is not contiguous.
    """
    on_host = any(group is each for group in _groups(args) for each in host_groups)
    for tensor in [] if name.startswith("c10d.barrier") else tensors_of(args, kwargs):
        if on_device(tensor) == on_host:
            kind = "gloo, for host tensors" if on_host else "NCCL"
            raise RuntimeError(f"{name}: No backend type associated with device type {tensor.device.type} ({kind})")
        if not on_host and not tensor.is_contiguous():
            raise ValueError(f"{name}: Tensors must be contiguous")
    return on_host


def on_host_tensors(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], host: Callable[[Any], Any], wrap: Callable[[Tensor], Tensor]
) -> Any:
    """Run the collective on the host tensors; results that are arguments are the very arguments."""
    arguments = {id(host(tensor)): tensor for tensor in tensors_of(args, kwargs)}
    result = func(*mapped(host, args), **mapped(host, kwargs))

    def back(leaf: Tensor) -> Tensor:
        return arguments[id(leaf)] if id(leaf) in arguments else wrap(leaf)

    return mapped(back, result)


def _groups(args: Sequence[Any]) -> Iterator[Any]:
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.ScriptObject):
            try:
                yield torch.distributed.ProcessGroup.unbox(leaf)
            except (RuntimeError, TypeError):
                continue
