"""Stage env: what is on the machine, and that everything can be imported and used."""

import shutil
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu.measure import DEVICE, GPU
from benchmarks.gpu.verdicts import Verdicts
from malora_dist.ops.devices import missing_for_triton
from malora_dist.training.gpu import Gpu, architecture_problem

# Beside what setup.cfg says the package needs: for `malora bench` and the tests. Triton has a verdict of its own.
FOR_CHECKS = ("peft", "pytest", "pytest-timeout")


def needed() -> list[Requirement]:
    """What the package and its checks need, and what that needs in turn, as the first that asks for it does.

    Builds of torch differ in what they need, and it is imported already.
    """
    config = ConfigParser()
    config.read("setup.cfg")
    lines = config["options"]["install_requires"].strip().splitlines()
    asked = [Requirement(line) for line in (*lines, *FOR_CHECKS)]
    found: dict[str, Requirement] = {}
    for each in asked:  # it grows meanwhile
        name = canonicalize_name(each.name)
        if name in found or not (each.marker is None or each.marker.evaluate({"extra": ""})):
            continue
        found[name] = each
        if name != "torch" and installed(each) is not None:
            asked += map(Requirement, requires(each.name) or [])
    return list(found.values())


def installed(package: Requirement) -> str | None:
    try:
        return version(package.name)
    except PackageNotFoundError:
        return None


def packages() -> str:
    """Say how many packages were found and which are older or newer than asked for. Missing ones are an error."""
    found = {each: installed(each) for each in needed()}
    missing = [each.name for each, number in found.items() if number is None]
    assert not missing, f"missing: {' '.join(missing)}"
    other = [
        f"{each.name} {number} is not {each.specifier}"
        for each, number in found.items()
        if not each.specifier.contains(str(number), prereleases=True)
    ]
    return f"{len(found)} found; {'; '.join(other) or 'of versions that fit'}"


def main_versions() -> str:
    names = ("triton", "transformers", "deepspeed", "bitsandbytes", "peft", "datasets", "pydantic", "pytest")
    return ", ".join(f"{name} {installed(Requirement(name))}" for name in names)


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
    import malora_dist.train
    import malora_dist.training.evaluation_run  # noqa: F401
    from malora_dist.models.resolve import native_dtype

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
    verdicts.log(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {name}, nvcc {shutil.which('nvcc')}")
    verdicts.log(main_versions())
    for check in (packages, bitsandbytes, deepspeed, product, triton):
        verdicts.attempt(check.__name__, check)
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
