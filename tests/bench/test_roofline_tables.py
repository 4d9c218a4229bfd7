"""The whole command, where there is no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from malora_dist.bench.local.output import Output
from malora_dist.bench.roofline_tables import RooflineOptions, run
from malora_dist.errors import ConfigError
from tests.e2e import ROOT


@pytest.mark.e2e
def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    arguments = ["bench", "roofline", "--tokens", "2048", "--base", "nf4", "--flops", "400TFLOP/s", *files]
    code = f"import sys; sys.modules['torch'] = None; from malora_dist.cli.app import main; main({arguments})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["tokens"], result["base"], result["device"]["flops"]) == (2048, "nf4", 400e12)
    # The rank that equals MALoRA's trainable parameters on LLaMA-2 7B's six targets.
    names = [step["name"] for step in result["steps"]]
    assert names[:4] == ["base", "lora r 71", "lora r 64", "peft_lora r 71"]
    for step in result["steps"]:
        assert step["seconds"] == pytest.approx(sum(step["phases"].values()))
    cases = {kernel["case"] for kernel in result["kernels"]}
    assert cases == {"4096 -> 4096", "4096 -> 11008", "11008 -> 4096"}
    text = (tmp_path / "r.md").read_text()
    command = "malora bench roofline --tokens 2048 --base nf4 --flops 400TFLOP/s"
    assert text.startswith(f"    {command}\n") and all(f"| {name} |" in text for name in names)


def test_mistakes_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--bandwidth='fast' must be"):
        run(RooflineOptions(bandwidth="fast"), Output())
    (tmp_path / "r.json").write_text("")
    with pytest.raises(ConfigError, match="exists, and is not overwritten"):
        run(RooflineOptions(), Output(tmp_path / "r.json"))
