"""What was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from malora_dist.errors import ConfigError
from malora_dist.training.gpu import Gpu, architecture_problem, bfloat16_problem, why_no_gpu

PACKAGES = ("transformers", "peft", "bitsandbytes", "triton")


def ready_device(name: str, threads: int | None = None, dtype: str | None = None) -> torch.device:
    """Return the device by its name, and set the number of threads if given.

    Raises ConfigError if there is no such device, or one that cannot compute, or not in `dtype`.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not (device.type == "cuda" or name == "cpu"):
        raise ConfigError(f"--device {name!r} must be cpu, cuda or cuda:NUMBER")
    if device.type == "cuda":
        _check_gpu(name, device.index or 0)
        _check_kind(Gpu.of(device), dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    return device


def _check_gpu(name: str, index: int) -> None:
    if not torch.cuda.is_available():
        why = why_no_gpu() or f"torch {torch.__version__} sees no GPU here"
        raise ConfigError(f"--device {name!r} must be cpu: {why}")
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"--device {name!r} must be one of {', '.join(f'cuda:{each}' for each in range(count))}")


def _check_kind(gpu: Gpu, dtype: str | None) -> None:
    problem = architecture_problem(gpu)
    if problem is None and dtype == "bf16":
        problem = bfloat16_problem(gpu, "--dtype bf16", "--dtype fp32")
    if problem is not None:
        raise ConfigError(problem)


def describe(device: torch.device | str) -> dict[str, Any]:
    """Return processor, threads, load, package versions, and the GPU with its driver, as plain values."""
    facts: dict[str, Any] = {
        "CPU": _processor(),
        "cores": os.cpu_count(),
        "threads used": torch.get_num_threads(),
        "load average before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    facts |= {package: found for package in PACKAGES if (found := _version(package)) is not None}
    if torch.device(device).type == "cuda":
        facts |= {"GPU": torch.cuda.get_device_name(device), "CUDA": torch.version.cuda, "driver": _driver()}
    return facts


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((part for part in lines[0].split() if part[:1].isdigit()), None) if lines else None
