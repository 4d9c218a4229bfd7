"""Stage env: what is on the machine, and that everything can be imported and used."""

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.measure import DEVICE, GPU
from benchmarks.gpu.verdicts import Verdicts
from malora_dist.engine.gpu import Gpu, architecture_problem
from malora_dist.functional.triton_ready import missing_for_triton

PACKAGES = ("triton", "transformers", "deepspeed", "bitsandbytes", "peft", "datasets", "pydantic", "pytest")


def packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} MISSING")
    return ", ".join(found)


def bitsandbytes() -> str:
    import bitsandbytes.functional as bnb
    from bitsandbytes.cextension import lib

    x = torch.randn(64, 64, device=DEVICE)
    codes, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    assert (bnb.dequantize_4bit(codes, state) - x).abs().max() < 1
    return str(getattr(getattr(lib, "_lib", lib), "_name", "")).rsplit("/", 1)[-1]


def deepspeed() -> str:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    assert accelerator.device_name() == DEVICE.type
    return f"{deepspeed.__version__} on {accelerator.device_name()}, {accelerator.communication_backend_name()}"


def product() -> str:
    import malora_dist.evaluate
    import malora_dist.train  # noqa: F401
    from malora_dist.source import native_dtype

    problem = architecture_problem(Gpu.of(DEVICE)) if GPU else None
    assert problem is None, problem
    return f"computes natively in {native_dtype(DEVICE)}"


def triton() -> str:
    missing = missing_for_triton(DEVICE)
    assert missing is None or not GPU, f"needs {missing}"
    return "kernels can run" if missing is None else f"needs {missing}"


def main() -> int:
    verdicts = Verdicts()
    name = torch.cuda.get_device_name(0) if GPU else "no GPU"
    verdicts.say(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {name}, nvcc {shutil.which('nvcc')}")
    verdicts.say(packages())
    for check in (bitsandbytes, deepspeed, product, triton):
        verdicts.attempt(check.__name__, check)
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
