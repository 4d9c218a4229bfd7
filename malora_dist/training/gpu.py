"""What a GPU is, what this build of torch can do with it, and why there may be none."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from malora_dist.launch.command import VISIBLE_DEVICES, refuses_gpus
from malora_dist.models.resolve import native_dtype

# Whoever can use an NVIDIA GPU of this machine has this file.
NVIDIA_DEVICE = Path("/dev/nvidiactl")
HIDES_ALL = ("", "-1", "NoDevFiles")


@dataclass(frozen=True)
class Gpu:
    """A GPU, its memory in bytes, and the architectures that this build of torch holds code for, such as sm_80."""

    name: str
    capability: tuple[int, int]
    bfloat16: bool
    total: int
    free: int
    built_for: tuple[str, ...]

    @classmethod
    def of(cls, device: torch.device) -> "Gpu":
        """Return the facts of a CUDA device."""
        free, total = torch.cuda.mem_get_info(device)
        return cls(
            name=torch.cuda.get_device_name(device),
            capability=torch.cuda.get_device_capability(device),
            bfloat16=native_dtype(device) == torch.bfloat16,
            total=total,
            free=free,
            built_for=tuple(torch.cuda.get_arch_list()),
        )


def architecture_problem(gpu: Gpu) -> str | None:
    """Return a sentence if this build of torch holds no code that the GPU can run."""
    if runs_on(gpu.built_for, gpu.capability):
        return None
    major, minor = gpu.capability
    return (
        f"{gpu.name} has the architecture sm_{major}{minor}, for which torch {torch.__version__} was not built: it has "
        f"{', '.join(gpu.built_for)}; install a build of torch for this GPU, or use another GPU"
    )


def runs_on(built_for: Iterable[str], capability: tuple[int, int]) -> bool:
    """Return whether code for one of the architectures runs on a GPU of that compute capability.

    sm_XY is machine code for X.Y and later GPUs of the same X, compute_XY is compiled at run time for any later GPU. An
    `a` at the end restricts both to X.Y, an `f` to the same X. Other names than these, as AMD's, are not judged.
    """
    parts = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in built_for]
    return not parts or any(part is None or _runs(part, capability) for part in parts)


def _runs(part: re.Match[str], capability: tuple[int, int]) -> bool:
    built = (int(part[2]), int(part[3]))
    if part[4] == "a":
        return built == capability
    return built <= capability and (built[0] == capability[0] or (part[1] == "compute" and part[4] == ""))


def bfloat16_problem(gpu: Gpu, setting: str, remedy: str) -> str | None:
    """Return a sentence if the GPU does not multiply the bfloat16 that a setting asks for; `remedy` is what to set."""
    if gpu.bfloat16:
        return None
    capability = ".".join(map(str, gpu.capability))
    return (
        f"{setting}: {gpu.name} has compute capability {capability} and does not support bfloat16 matrix products, "
        f"which need 8.0 or higher; set {remedy}"
    )


def why_no_gpu() -> str | None:
    """Return a sentence if this machine has an NVIDIA GPU that torch cannot use, though nothing forbids it."""
    hidden = any(os.environ.get(name, "0").strip() in HIDES_ALL for name in VISIBLE_DEVICES)
    if not NVIDIA_DEVICE.exists() or refuses_gpus(os.environ) or hidden:
        return None
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, and torch {torch.__version__} is a build for the CPU, where the run then "
            "computes; install a build for CUDA (pytorch.org/get-started)"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"this machine has an NVIDIA GPU, and torch {torch.__version__} cannot use it: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
