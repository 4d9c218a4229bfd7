"""The whole command on small layers; no time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from malora_dist.bench.local.layer import LayerOptions, OneLinear, Pass, run
from malora_dist.bench.local.options import names_on_one_linear
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.bench.local.peers.build import Base, build
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.errors import ConfigError
from tests.commands import malora


def names_here(dtype: str) -> list[str]:
    return list(taking_part(None, names_on_one_linear(dtype), torch.device("cpu")))


def test_everyone_on_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    command = ["bench", "layer", "--size", "64,64x96", "--tokens", "16,24", "--repeats", "2", "--warmup", "0"]
    assert malora(*command, *files) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["command"] == "malora bench layer --size 64,64x96 --tokens 16,24 --repeats 2 --warmup 0"
    names, records = [*names_here("fp32"), "gemm"], report["records"]
    assert [record["name"] for record in records] == names * 4
    assert len({record["case"] for record in records}) == 4 and all(record["median_s"] > 0 for record in records)
    assert [r["facts"]["tokens"] for r in records if r["name"] == "malora"] == [16, 24, 16, 24]
    facts = {record["name"]: record["facts"] for record in records[: len(names)]}
    assert facts["peft_lora"]["trainable"] == facts["lora"]["trainable"] == 64 * 128
    assert facts["malora"]["trainable"] == facts["malora_dispatched"]["trainable"] == 64 * 40 + 96 * 32 + 96 * 64
    assert facts["malora_grouped"]["form"] == "grouped" and facts["gemm"]["GFLOP/s"] > 0
    assert "layer 64 -> 96, T 24, fp32" in capsys.readouterr().out
    assert (tmp_path / "a.md").read_text().count("### layer") == 4
    with pytest.raises(ConfigError, match="exists, and is not overwritten"):
        malora(*command, *files, "--traceback")


def test_four_bits_and_dropout() -> None:
    options = LayerOptions(size="64", tokens="16", base="nf4", dropout=0.1, dtype="bf16", repeats=1, warmup=0)
    report = run(options, Output())
    assert [record.name for record in report.records] == [*names_here("bf16"), "gemm"]
    # PEFT's linears unpack in another way than the base's.
    shared = [record.name for record in report.records if "adapter ms" in record.facts]
    assert shared == [name for name in names_here("bf16") if name != "base" and not name.startswith("peft")]


def test_a_pass_leaves_the_gradients_of_one_pass() -> None:
    base = Base.of(OneLinear(64, 48, torch.float32, torch.device("cpu")), ["linear"], load_in_4bit=False, peft=False)
    one = Pass(build(BASELINES["malora"], base), torch.randn(8, 64), torch.randn(8, 48))
    before = [p.clone() for p in one.adapted.trained]
    one()
    first = [one.x_TI.grad, *(p.grad for p in one.adapted.trained)]
    one()
    second = [one.x_TI.grad, *(p.grad for p in one.adapted.trained)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, one.adapted.trained, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": "fp16"}, {"base": "int8"}, {"only": "qlora"}, {"against": "qlora"}, {"size": "x"}, {"device": "cpu:1"}],
)
def test_wrong_options_are_named(wrong: dict[str, str]) -> None:
    options = {"size": "64", "tokens": "4", "only": "base", "repeats": 1, "warmup": 0} | wrong
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}"):
        run(LayerOptions(**options), Output())  # type: ignore[arg-type]


def test_nothing_is_built_for_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for wrong, message in (
        ({"against": "lora"}, "--against 'lora' takes no part: base"),
        ({"against": "gemm"}, "--against 'gemm' takes no part: base"),
        ({"only": "malora_grouped_triton"}, "adapter.computation=grouped_triton needs a CUDA device"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(LayerOptions(**{"size": "64", "tokens": "4", "only": "base", **wrong}), Output())  # type: ignore[arg-type]
    assert "layer 64" not in capsys.readouterr().err
