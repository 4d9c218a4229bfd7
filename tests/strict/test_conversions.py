"""`malora convert --verify --device` with the base on the device: the same adapters as on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from malora_dist.bench.strict.device import StrictDevice
from malora_dist.convert.job import convert
from malora_dist.convert.kinds import ConvertOptions
from tests.convert.made import make_workspace
from tests.e2e import files

# Kinds that run the base, and what each takes from: what it gives to measure or verify.
CONVERSIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "molora": (("malora",), {}),
    "malora": (("lora", "lora"), {}),
    "peft-tasks": (("hydralora",), {"calibration": 2, "eval_samples": 2}),
    "peft": (("dora",), {}),
    "merged": (("dora",), {}),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("strict"))


@pytest.mark.parametrize("kind", list(CONVERSIONS))
def test_adapters_are_those_of_the_cpu(strict: StrictDevice, workspace: Path, tmp_path: Path, kind: str) -> None:
    names, options = CONVERSIONS[kind]
    sources, said = tuple(workspace / "runs" / name for name in names), list[str]()
    recipe = sources[0] / "config.yaml"
    convert(kind, sources, tmp_path / "cpu", ConvertOptions(**options, recipe=recipe))
    assert not strict.counts.launches
    convert(
        kind,
        sources,
        tmp_path / "strict",
        ConvertOptions(**options, recipe=recipe, device="strict", verify=True),
        said.append,
    )
    assert strict.counts.launches and any("verified" in line for line in said)
    assert files(tmp_path / "cpu") == files(tmp_path / "strict")
    for path in (tmp_path / "cpu").rglob("*.safetensors"):
        # Not bit for bit where gates were measured: the CPU has an attention kernel of its own.
        found = load_file(tmp_path / "strict" / path.relative_to(tmp_path / "cpu"))
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
