"""What CUDA refuses, waits for, and adds up without an order, by ATen operation and its arguments.

Arguments are asked through `on_device`, which says of a tensor whether it is on the device.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

OnDevice = Callable[[Any], bool]

COPIES = ("aten._to_copy.", "aten.copy_.", "aten._copy_from", "aten.copy.")
INDEXING = ("aten.index.", "aten.index_put", "aten._index_put_impl", "aten._unsafe_index", "aten._unsafe_index_put")
# Beside elementwise operations: what takes a number that is a host tensor without dimensions.
TAKES_NUMBERS = (
    "aten.masked_fill",
    "aten.index_put",
    "aten._index_put_impl",
    "aten.index_fill",
    "aten.fill",
    "aten._foreach_",
    "aten._fused_adam",
    "aten._fused_sgd",
    "aten.full_like",
)
# Allocations, and answers from what the host knows of a tensor.
LAUNCHES_NOTHING = (
    "aten._unsafe_view",
    "aten.empty",
    "aten.new_empty",
    "aten.lift",
    "aten.set_",
    "aten.resize_",
    "aten.is_pinned",
    "aten.is_same_size",
    "aten._has_",
    "aten._version",
    "aten.record_stream",
)
# Beside those whose tags say that they depend on the data.
WAITS = (
    "aten._local_scalar_dense",
    "aten.is_nonzero",
    "aten.equal",
    "aten.linalg_svd",
    "aten._linalg_svd",
    "aten.linalg_eig",
    "aten._linalg_eigh",
    "aten.linalg_lstsq",
    "aten.linalg_solve",
    "aten.linalg_inv.",
    "aten.linalg_cholesky.",
    "aten._unique",
)
ATOMICS = (
    "aten.index_add",
    "aten.scatter_add",
    "aten.scatter_reduce",
    "aten.index_reduce",
    "aten.bincount",
    "aten.histc",
    "aten.put_",
    "aten.embedding_dense_backward",
    "aten._embedding_bag_backward",
    "aten._scaled_dot_product_flash_attention_backward",
    "aten._scaled_dot_product_efficient_attention_backward",
)
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.addbmm", "aten.mv", "aten.dot")


@cache
def name_of(func: Any) -> str:
    """Return the name, as `aten.add.Tensor`."""
    return str(func)


@cache
def _tagged(func: Any, tag: torch.Tag) -> bool:
    return tag in func.tags


def tensors_of(*values: Any) -> list[Tensor]:
    """Return all tensors in nested arguments or results."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_of(*value)
        elif isinstance(value, dict):
            found += tensors_of(*value.values())
    return found


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Replace every tensor in nested arguments or results; PyTorch's own does this for any kind of tree, slowly."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [mapped(function, each) for each in value]
    if isinstance(value, tuple):
        return tuple(mapped(function, each) for each in value)
    return {key: mapped(function, each) for key, each in value.items()} if isinstance(value, dict) else value


def check(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor], on_device: OnDevice
) -> None:
    """Raise RuntimeError where CUDA would, for an operation that has at least one tensor of the device.

    tensors: all of the arguments.
    """
    name = name_of(func)
    strangers = [tensor for tensor in tensors if not on_device(tensor)]
    if strangers and not name.startswith(COPIES):
        strangers = _not_allowed(strangers, func, name, args, kwargs, on_device)
        if strangers:
            seen = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {seen}")
    if name.partition(".default")[0].rstrip("_") in PRODUCTS:
        whole = [t.dtype for t in tensors if not (t.is_floating_point() or t.is_complex())]
        if whole:
            raise RuntimeError(f'"{name}" not implemented on CUDA for {whole[0]}')


def _not_allowed(
    strangers: list[Tensor],
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    on_device: OnDevice,
) -> list[Tensor]:
    """Return those of the host tensors that stand where CUDA takes none."""
    target = args[0] if args and isinstance(args[0], Tensor) else None
    if host_indices(name, args, on_device):
        strangers = [t for t in strangers if all(t is not index for index in args[1])]
    written = target if _tagged(func, torch.Tag.inplace) else kwargs.get("out")
    takes_numbers = _tagged(func, torch.Tag.pointwise) or name.startswith(TAKES_NUMBERS)
    if takes_numbers and all(tensor is not written for tensor in strangers):
        strangers = [tensor for tensor in strangers if tensor.dim() > 0]
    return strangers


def host_indices(name: str, args: Sequence[Any], on_device: OnDevice) -> int:
    """Count the host tensors that index a tensor of the device: each is copied there first, which waits."""
    if not name.startswith(INDEXING) or not on_device(args[0]):
        return 0
    return sum(index is not None and not on_device(index) for index in args[1])


@cache
def launches(func: Any) -> bool:
    """Return whether the operation starts a kernel or a copy."""
    return not func.is_view and not name_of(func).startswith(LAUNCHES_NOTHING)


def waits(func: Any, args: Sequence[Any], kwargs: dict[str, Any], on_device: OnDevice) -> bool:
    """Return whether the host waits until the device has done everything before."""
    name = name_of(func)
    if name.startswith(WAITS) or _tagged(func, torch.Tag.data_dependent_output):
        return True
    if name.startswith(COPIES):
        source, target = _ends_of_copy(name, args, kwargs, on_device)
        return source != target and not (kwargs.get("non_blocking") or tuple(args[2:3]) == (True,))
    if name.startswith(INDEXING):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        # One mask and one number to put in is a masked_fill.
        fills = "put" in name and len(masks) == len(args[1]) == 1 and args[2].numel() == 1
        return bool(masks) and not fills
    if name.startswith("aten.repeat_interleave"):
        return kwargs.get("output_size") is None
    return _tagged(func, torch.Tag.dynamic_output_shape)


def _ends_of_copy(name: str, args: Sequence[Any], kwargs: dict[str, Any], on_device: OnDevice) -> tuple[bool, bool]:
    """Return whether source and target are on the device."""
    if not name.startswith("aten._to_copy."):
        return on_device(args[1]), on_device(args[0])
    source, wanted = on_device(args[0]), kwargs.get("device")
    return source, source if wanted is None else torch.device(wanted).type != "cpu"


@cache
def adds_without_order(func: Any) -> bool:
    """Return whether numbers are added up by atomics, so that bits may differ from run to run."""
    return name_of(func).startswith(ATOMICS)
