"""Devices: copies to them, and whether Triton kernels can run there."""

import importlib.util
import os
import shutil
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

# Below it Triton is not tested any more, and bf16 products do not exist.
MIN_CAPABILITY = (8, 0)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`. CUDA copies without making the host wait only from pinned memory."""
    if torch.device(device).type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def triton_ready(device: torch.device) -> bool:
    """Return whether Triton kernels can run on tensors of `device`.

    False while `torch.compile` traces, so that what is traced does not depend on the machine.
    """
    return not torch.compiler.is_compiling() and missing_for_triton(device) is None


@lru_cache
def missing_for_triton(device: torch.device) -> str | None:
    """Return what Triton kernels lack on `device`, in words that continue "needs ..."; None if they can run.

    The answer is kept: the environment is read once, as Triton itself reads it.
    """
    if importlib.util.find_spec("triton") is None:
        return 'triton, which is not installed: pip install "malora_dist[kernels]"'
    from triton import knobs

    if knobs.runtime.interpret and device.type in ("cpu", "cuda"):
        return None
    if device.type != "cuda":
        return f"a CUDA device, not {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        wanted, found = (".".join(map(str, numbers)) for numbers in (MIN_CAPABILITY, capability))
        return f"a GPU of compute capability {wanted} or higher, and {torch.cuda.get_device_name(device)} has {found}"
    return None if knobs.build.impl is not None else missing_for_c()


def missing_for_c() -> str | None:
    """Return what is missing to compile Triton's launchers, which it does with a C compiler when it first runs."""
    if "CC" in os.environ:
        if shutil.which(os.environ["CC"]) is None:
            return f"a C compiler, and CC={os.environ['CC']} is not a program: set CC to one"
    elif shutil.which("gcc") is None and shutil.which("clang") is None:
        return "a C compiler, and neither gcc nor clang is in PATH: install one, or set CC"
    header = _python_headers() / "Python.h"
    if not header.is_file():
        return f"Python's headers, and there is no {header}: install them (python3-dev, python3-devel)"
    return None


def _python_headers() -> Path:
    """Return the folder where Triton looks for them."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
