"""The whole command on a small width: everyone in every case, counts and not times, and options that cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from malora_dist.bench.local.launch_cases import CASES
from malora_dist.bench.local.launches import LaunchOptions, run
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.records import Report
from malora_dist.errors import ConfigError

ONLY = "peft_lora,peft_dora,malora,malora_fused"


def test_everyone_is_counted_in_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(LaunchOptions(hidden=64, tokens=8, only=ONLY), Output(tmp_path / "l.json", tmp_path / "l.md"))
    assert Report.from_dict(json.loads((tmp_path / "l.json").read_text())).records == report.records
    assert "| peft_lora |" in (tmp_path / "l.md").read_text() and "above base" in capsys.readouterr().out
    cases = list(dict.fromkeys(record.case for record in report.records))
    assert len(cases) == 2 * len(CASES)
    for case in cases:
        found = {record.name: record.facts for record in report.records if record.case == case}
        assert list(found) == ["base", *ONLY.split(",")]
        for name, facts in found.items():
            assert facts["launches"] == found["base"]["launches"] + facts["above base"]
            assert (facts["above base"] > 0 and facts["MiB moved"] > found["base"]["MiB moved"]) == (name != "base")
    # Linears of one input whose projections are fused launch less than each for itself.
    together, apart = (
        next(r.facts["launches"] for r in report.records if r.name == name and r.case.startswith("projections"))
        for name in ("malora_fused", "malora")
    )
    assert together < apart


def test_peft_is_left_out_of_a_4_bit_base(capsys: pytest.CaptureFixture[str]) -> None:
    report = run(LaunchOptions(hidden=64, tokens=8, base="nf4", dropout="0", only="peft_lora,lora"), Output())
    assert {record.name for record in report.records} == {"base", "lora"}
    assert "peft_lora left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 72}, "--hidden 72 must be a multiple of 16"),
        ({"dtype": "fp16"}, "--dtype 'fp16' must be one of"),
        ({"base": "int8"}, "--base 'int8' must be one of"),
        ({"dropout": "1"}, "--dropout '1' must be a list"),
        ({"dropout": "a"}, "--dropout 'a' must be a list"),
        ({"only": "qlora"}, "--only 'qlora': qlora is not one of base, peft_lora"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(LaunchOptions(**wrong), Output())
