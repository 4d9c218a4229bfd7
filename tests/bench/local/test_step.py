"""The whole command on a small model: everyone on the same tokens, from the same loss. No time is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from malora_dist.bench.local.equal_work import check_losses, check_outputs
from malora_dist.bench.local.options import default_names
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.peers.here import taking_part
from malora_dist.bench.local.step import StepOptions, run
from malora_dist.errors import ConfigError
from tests.commands import malora
from tests.tiny_models import save_tiny_llama

SMALL: dict[str, Any] = {"batch": 2, "length": 12, "dtype": "fp32", "repeats": 1, "warmup": 0}


def names_here(dtype: str) -> list[str]:
    return list(taking_part(None, default_names(dtype), torch.device("cpu")))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    save_tiny_llama(tmp_path / "model")
    return str(tmp_path / "model")


def test_everyone_starts_from_one_loss_on_the_same_tokens(folder: str, tmp_path: Path) -> None:
    words = [f"--{name}={value}" for name, value in SMALL.items()]
    assert malora("bench", "step", "--model", folder, *words, "--json", str(tmp_path / "a.json")) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    records = {record["name"]: record for record in report["records"]}
    assert list(records) == [*names_here("fp32"), "gemm"]
    gemm = records.pop("gemm")
    assert gemm["facts"]["GFLOP/s"] > 0 and "ratio" not in gemm
    facts = [record["facts"] for record in records.values()]
    assert {(f["tokens"], f["learned"]) for f in facts} == {(24, 22)}
    assert [f["first loss"] for f in facts] == pytest.approx([facts[0]["first loss"]] * len(facts), abs=1e-5)
    trained = {name: record["facts"]["trainable"] for name, record in records.items()}
    assert trained["base"] == 0 and trained["peft_lora"] == trained["lora"]
    assert trained["malora"] == trained["malora_grouped"] == trained["malora_dispatched"] == trained["malora_looped"]
    assert {record["against"] for record in records.values()} == {"peft_lora"}


def test_both_losses_are_one_number(folder: str) -> None:
    losses = {
        loss: run(StepOptions(model=folder, **SMALL, labels="0.25", only="base,peft_lora,malora", loss=loss), Output())
        for loss in ("hf", "chunked")
    }
    facts = {loss: [r.facts for r in report.records if r.name != "gemm"] for loss, report in losses.items()}
    assert all(f["learned"] == 2 * 3 for f in facts["hf"] + facts["chunked"])
    assert facts["chunked"][2]["first loss"] == pytest.approx(facts["hf"][0]["first loss"], abs=1e-5)


def test_four_bits_dropout_and_bf16(folder: str) -> None:
    options = StepOptions(model=folder, **SMALL | {"dtype": "bf16"}, base="nf4", dropout=0.1)
    records = run(options, Output()).records
    assert [record.name for record in records] == [*names_here("bf16"), "gemm"]
    # PEFT's linears unpack in another way than the base's.
    assert not any("adapter ms" in record.facts for record in records if record.name.startswith("peft"))
    assert all("adapter ms" in record.facts for record in records if "lora" in record.name[:7])


def test_other_cases(folder: str) -> None:
    experts, tokens, optimizer = (
        {record.name: record for record in run(StepOptions(model=folder, **SMALL, case=case), Output()).records}
        for case in ("experts", "tokens", "optimizer")
    )
    assert list(experts) == ["malora_e8", "malora_e64", "malora_grouped_e8", "malora_grouped_e64"]
    assert experts["malora_e64"].facts["trainable"] > 4 * experts["malora_e8"].facts["trainable"]
    assert experts["malora_e64"].against == "malora_e8"
    assert tokens["malora_2x"].facts["tokens"] == 2 * tokens["malora"].facts["tokens"] == 48
    assert tokens["malora_2x"].against == "malora" and tokens["base_2x"].against == "base"
    assert {record.against for record in optimizer.values()} == {"lora_equal"}
    counts = [record.facts["trainable"] for record in optimizer.values()]
    assert max(counts) < 1.05 * min(counts)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"case": "none"}, "--case"),
        ({"loss": "mse"}, "--loss"),
        ({"case": "experts", "only": "lora"}, "lora has no experts"),
        ({"case": "optimizer", "only": "base"}, "base trains nothing"),
        ({"model": "./nowhere"}, "no such folder"),
    ],
)
def test_wrong_options_are_named(wrong: dict[str, Any], named: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run(StepOptions(**{"model": folder, **SMALL, **wrong}), Output())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"against": "peft_lroa"}, "--against 'peft_lroa' takes no part: base, malora"),
        ({"against": "gemm"}, "--against 'gemm' takes no part"),
        ({"case": "optimizer", "only": "malora", "against": "lora"}, "--against 'lora' takes no part: malora"),
        ({"case": "experts", "only": "malora", "against": "malora"}, "--against has no meaning with --case experts"),
        ({"case": "tokens", "against": "malora"}, "--against has no meaning with --case tokens"),
        ({"labels": "some"}, "--labels 'some'"),
        ({"device": "cuda:x"}, "--device 'cuda:x'"),
        ({"only": "malora_grouped_triton"}, "adapter.computation=grouped_triton needs a CUDA device"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    wrong: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=named):
        run(StepOptions(**{"model": "./nowhere", "only": "base,malora", **SMALL, **wrong}), Output())


def test_outputs() -> None:
    y = torch.tensor([3.0, -4.0])
    # Of the shapes one broadcasts and one does not.
    check_outputs({"base": y, "same": y + 1e-5}, torch.float32)
    for wrong in (y + 1e-2, y[:1], torch.ones(3), y * float("nan")):
        with pytest.raises(RuntimeError, match="other does other work than base"):
            check_outputs({"base": y, "other": wrong}, torch.float32)


def test_losses() -> None:
    check_losses({"base": 2.0, "same": 2.0 + 1e-5}, torch.float32)
    for wrong in (2.1, float("nan")):
        with pytest.raises(RuntimeError, match="other does other work than base"):
            check_losses({"base": 2.0, "other": wrong}, torch.float32)
