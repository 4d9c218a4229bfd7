"""A device that computes on the CPU and keeps a GPU's rules: `strict`. No GPU is needed.

    backend.register()                                     # PyTorch learns of the device type
    with StrictDevice() as device:                         # the device exists inside; everything is counted
        x = torch.randn(3, 4, device="strict")
        x + torch.ones(4)                                  # RuntimeError: tensors on different devices, as CUDA says
    print(device.counts.report())                          # launches, waits of the host, sums without an order

Errors, as CUDA raises them:
  * All tensors of an operation are on the device, those of an operator registered with torch.library too. Host tensors
    without dimensions may be operands (not the target) of elementwise operations, a value to fill or put in, or a
    learning rate; host tensors may index a tensor of the device (they are copied, which waits).
  * A generator belongs to the device of what it fills. There is no generator of this device: pass none.
  * `.numpy()`, `numpy.asarray`: the host cannot read device memory. Only host memory can be pinned; views of pinned
    memory say they are not, unlike CUDA's.
  * Matrix products of integers do not exist.
  * Collectives of a group take contiguous tensors of the device. `host_groups` holds the groups that take host tensors
    instead (a gloo group beside NCCL's).

Counts are in `counts.Counts`. An operator of torch.library (`malora::`, `bitsandbytes::`) is one launch: a kernel of
its own on CUDA, and here its CPU form on the host tensors, whose operations do not count.

Not imitated: time; backward in a thread of its own; the kernels of CUDA (Triton's, and the attention CUDA would choose:
here it is the plain one); streams, NCCL's transport and memory; autocast; `x.data = host tensor`, which CUDA
takes; tensor subclasses, such as bitsandbytes' Params4bit. One operation is one launch, also if CUDA starts several for
it (sort, large reductions), splits it (fused AdamW over many tensors), or none (no numbers at all). Random numbers are
those of the host's generator, so a run here and a run on the CPU draw the same.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.weak import WeakIdKeyDictionary

from malora_dist.bench.strict import rules
from malora_dist.bench.strict.collectives import check_collective, on_host_tensors
from malora_dist.bench.strict.counts import Counts

TYPE = "strict"
# Views that change signs as they are read.
LAZY = ("aten._conj.", "aten._neg_view.")


class StrictTensor(Tensor):
    """A tensor that says it is on the device; its numbers are those of `host`, a CPU tensor."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> "StrictTensor":
        made: StrictTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(TYPE, 0),
            requires_grad=False,
        )
        made.host = host
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StrictTensor({self.host})"

    @property
    def data(self) -> Tensor:
        values: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return values

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, StrictTensor):
            raise TypeError("x.data = a host tensor: CUDA takes it, this device cannot")
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.host = value.host

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError(f"cannot pin a tensor of {TYPE}: only dense CPU tensors can be pinned")

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {TYPE}:0 device type tensor to numpy. Use Tensor.cpu() to copy it first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        note("launches", "tolist")
        note("waits", "tolist")
        return self.host.tolist()

    def record_stream(self, _: Any) -> None: ...

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Only where the mode is not: in another thread, or inside of it.
        return _run(func, args, kwargs or {})


class StrictDevice(TorchDispatchMode):
    """Inside, tensors of the device can be made, and `counts` counts what would be launched and waited for."""

    active: "ClassVar[list[StrictDevice]]" = []

    def __init__(self, watch: str = "malora_dist") -> None:
        super().__init__()
        self.counts = Counts(watch)
        self.host_groups: list[Any] = []
        self.pinned = WeakIdKeyDictionary()
        # Backward in the caller's thread: autograd's own for this device may abort the interpreter as it ends.
        self._one_thread: list[Any] = []

    def __enter__(self) -> "StrictDevice":
        StrictDevice.active.append(self)
        self._one_thread.append(torch.autograd.set_multithreading_enabled(False))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        StrictDevice.active.pop()
        super().__exit__(*error)
        self._one_thread.pop().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # In inference mode an operation made of others arrives whole.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


def note(kind: str, name: str, number: int = 1) -> None:
    """Count for the innermost StrictDevice, if there is one."""
    if StrictDevice.active:
        StrictDevice.active[-1].counts.note(kind, name, number)


def copy_between(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy where no mode has seen it, such as in torch.tensor(numbers, device=...)."""
    note("launches", "aten._copy_from")
    if on_device(source) != on_device(target) and not non_blocking:
        note("waits", "aten._copy_from")
    _host(target).copy_(_host(source))
    return target


def on_device(leaf: Any) -> bool:
    """Return whether it is a tensor of the device."""
    return isinstance(leaf, StrictTensor)


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, StrictTensor) else leaf


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the operation by CUDA's rules, on the host tensors behind its arguments."""
    name = rules.name_of(func)
    if name.startswith("c10d."):
        return _run_collective(func, name, args, kwargs)
    tensors = rules.tensors_of(args, kwargs)
    ours = any(on_device(tensor) for tensor in tensors)
    wanted = kwargs.get("device")
    to_device = wanted is not None and torch.device(wanted).type == TYPE
    if not ours and not to_device:
        return _run_on_host(func, name, args, kwargs)
    if ours:
        rules.check(func, args, kwargs, tensors, on_device)
    if kwargs.get("generator") is not None:
        found = kwargs["generator"].device.type
        raise RuntimeError(f"{name}: Expected a '{TYPE}' device type for generator but found '{found}'")
    result = _compute(func, name, rules.mapped(_host, args), _host_settings(kwargs))
    _count(func, args, kwargs, [*tensors, *rules.tensors_of(result)])
    if name.startswith("aten._to_copy.") and wanted is not None and not to_device:
        return result
    if name.startswith("aten.resize_"):
        args[0].data = StrictTensor(args[0].host)
        return args[0]
    if name.startswith(rules.COPIES[1:]) and not on_device(args[0]):
        return args[0]
    if name.startswith(LAZY):
        # A tensor of the device could not say that its numbers on the host are to be read with another sign.
        return StrictTensor(result.resolve_conj().resolve_neg())
    wrapped = rules.mapped(StrictTensor, result)
    aliases = ours and (func.is_view or func._schema.is_mutable)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if aliases else wrapped


def _compute(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on host tensors; histograms of whole numbers, which only CUDA has, on floating-point ones."""
    if name.startswith("aten.histc.") and not args[0].is_floating_point():
        return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _run_on_host(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the operation on host tensors alone; memory that must be pinned is only recorded as such."""
    if not StrictDevice.active:
        return func(*args, **kwargs)
    pinned = StrictDevice.active[-1].pinned
    if name.startswith("aten.is_pinned"):
        return args[0] in pinned
    if not (name.startswith("aten._pin_memory") or kwargs.get("pin_memory")):
        return func(*args, **kwargs)
    made = func(*args, **{**kwargs, "pin_memory": False}) if "pin_memory" in kwargs else args[0].clone()
    pinned[made] = True
    return made


def _host_settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for the host's form of an operation."""
    settings: dict[str, Any] = rules.mapped(_host, kwargs)
    if settings.get("device") is not None:
        settings["device"] = torch.device("cpu")
    if settings.get("pin_memory"):
        settings["pin_memory"] = False
    return settings


def _count(func: Any, args: Any, kwargs: dict[str, Any], moved: list[Tensor]) -> None:
    name = rules.name_of(func)
    for _ in range(rules.host_indices(name, args, on_device)):
        note("waits", f"{name} (host index)")
    if not rules.launches(func):
        return
    note("launches", name)
    note("nbytes", name, sum(tensor.numel() * tensor.element_size() for tensor in moved))
    if rules.waits(func, args, kwargs, on_device):
        note("waits", name)
    if rules.adds_without_order(func):
        note("atomics", name)


def _run_collective(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    if not StrictDevice.active:
        return on_host_tensors(func, args, kwargs, _host, StrictTensor)
    on_host = check_collective(name, args, kwargs, StrictDevice.active[-1].host_groups, on_device)
    if on_host:
        return func(*args, **kwargs)
    if rules.tensors_of(args, kwargs) and not name.startswith("c10d.barrier"):
        note("launches", name)
    return on_host_tensors(func, args, kwargs, _host, StrictTensor)
