"""The whole command on a small Llama: exact numbers, the same work for all, and bytes against the formula."""

from typing import Any

import pytest
import torch

from malora_dist.bench.local.memory import MemoryOptions, peaks, run
from malora_dist.bench.local.output import Output
from malora_dist.bench.local.peers.baselines import BASELINES
from malora_dist.bench.local.records import Measurement
from malora_dist.bench.local.step_setup import StepSetup
from malora_dist.errors import ConfigError
from tests.tiny_models import save_tiny_llama

SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
ONLY = "base,peft_lora_equal,peft_lora_fp32_equal,malora"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("memory")
    save_tiny_llama(path, **SIZES, tie_word_embeddings=True)
    return str(path)


def options(folder: str, **changes: Any) -> MemoryOptions:
    given = {"batch": 2, "length": 64, "only": ONLY, "repeats": 1, "warmup": 0}
    return MemoryOptions(model=folder, **{**given, **changes})


@pytest.fixture(scope="module")
def records(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[Measurement]:
    files = tmp_path_factory.mktemp("files")
    report = run(options(folder), Output(files / "m.json", files / "m.md"))
    assert "| malora |" in (files / "m.md").read_text() and (files / "m.json").is_file()
    return report.records


def found(records: list[Measurement], name: str, *words: str) -> Measurement:
    (record,) = [record for record in records if record.name == name and all(word in record.case for word in words)]
    return record


def test_every_case_is_there_with_the_same_work(records: list[Measurement]) -> None:
    peaks_found = [record for record in records if record.peak_bytes is not None]
    assert [record.name for record in peaks_found] == 4 * ONLY.split(",")
    assert {record.facts["tokens"] for record in peaks_found} == {128}
    assert len({record.case for record in peaks_found}) == 4
    malora, peft = (found(records, name, "off", "full").facts["trainable"] for name in ("malora", "peft_lora_equal"))
    assert abs(malora - peft) < 0.02 * malora
    timed = [record.name for record in records if record.median_s is not None]
    assert timed == ["base_full", "base_nf4", "malora_full", "malora_nf4"]


def test_a_peak_is_the_sum_of_its_parts(records: list[Measurement]) -> None:
    for record in records:
        if record.peak_bytes is not None:
            parts = sum(record.facts[f"MiB {part}"] for part in ("base", "adapters", "optimizer", "above"))
            batch = 2 * 2 * 64 * 8
            assert record.peak_bytes == parts * 2**20 + batch
    full = found(records, "malora", "off", "full")
    # Adapters in fp32, two moments of each number, and a step count for each tensor.
    assert full.facts["MiB adapters"] * 2**20 == 4 * full.facts["trainable"]
    assert full.facts["MiB optimizer"] * 2**20 == 8 * full.facts["trainable"] + 4 * 4 * 6 * SIZES["num_hidden_layers"]
    peft = found(records, "peft_lora_equal", "off", "full")
    assert full.ratio == pytest.approx((full.peak_bytes or 0) / (peft.peak_bytes or 1))


def test_checkpointing_and_4_bits_save_what_they_should(records: list[Measurement]) -> None:
    for name in ONLY.split(","):
        plain, recomputed, small = (
            found(records, name, f"checkpointing {switch}", base).facts
            for switch, base in (("off", "full"), ("on", "full"), ("off", "nf4"))
        )
        # A layer that keeps what recomputation made would hold every block's tensors, and need more than without it.
        assert recomputed["MiB above"] < plain["MiB above"]
        # Every linear but the head: 4.5 bits a weight instead of 16.
        linears = SIZES["num_hidden_layers"] * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
        saved = (plain["MiB base"] - small["MiB base"]) * 2**20
        slack = 64 * 7 * SIZES["num_hidden_layers"] if name.startswith("peft") else 0  # bitsandbytes' code tables
        assert 0 <= linears * (2 - 4.5 / 8) - saved <= slack


def test_bytes_of_the_model_are_the_formulas(records: list[Measurement]) -> None:
    assert found(records, "4-bit linears", "nf4").facts["bytes / bf16"] == 4.5 / 16
    for base in ("full", "nf4"):
        facts = found(records, "model with malora", base).facts
        assert facts["bytes"] == facts["plan"]


def test_a_peak_repeats_exactly(folder: str) -> None:
    first, second = (
        peaks(StepSetup(options(folder).of_step("full"), torch.device("cpu"), peft=False), baselines, "off")
        for baselines in 2 * [{name: BASELINES[name] for name in ("base", "malora")}]
    )
    assert [record.peak_bytes for record in first] == [record.peak_bytes for record in second]


def test_mistakes_are_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for changes, message in (
        ({"checkpointing": "maybe"}, "--checkpointing 'maybe' must be one of off, on"),
        ({"base": "full,int8"}, "--base 'int8' must be one of full, nf4"),
        ({"only": "base,mylora"}, "--only 'base,mylora': mylora is not one of"),
        ({"only": ","}, "--only ',': nobody is not one of"),
        ({"only": "malora_grouped_triton"}, "adapter.computation=grouped_triton needs a CUDA device"),
        ({"labels": "some"}, "--labels 'some' must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(options("./nowhere", **changes), Output())
