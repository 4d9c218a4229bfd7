"""The command: tables for people, one JSON object for programs, without torch."""

import json
from functools import partial
from typing import Any

import pytest

from malora_dist.plan.table import KINDS
from tests.commands import malora, malora_without_torch
from tests.config.recipes import RECIPES

RECIPE, MODEL = str(RECIPES / "llama2-7b-inter.yaml"), str(RECIPES / "models" / "llama2-7b.json")
run = partial(malora, "plan")


def plan(*arguments: str) -> dict[str, Any]:
    """The JSON of the command, run where torch cannot be imported."""
    done = malora_without_torch("plan", RECIPE, "--model", MODEL, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.e2e
def test_json_has_what_programs_need() -> None:
    result = plan("--gpus-per-node", "4", "--train.gradient_checkpointing=false", "--hbm", "40GiB", "--adapter.r", "6")
    assert result["trainable_parameters"] == 32 * (40 * 31488 + 48 * 38400 + 6 * 8 * 6 * 32)
    assert set(result["bytes_per_rank"]) == {*KINDS, "total"}
    assert {"tokens", "tokens_worst_case", "weights", "base_gather"} <= set(result["exchange_bytes_per_step"])
    assert result["fits"] is (result["bytes_per_rank"]["total"] <= 0.94 * 40 * 2**30)
    assert all(isinstance(line, str) for line in result["advice"])
    assert result["settings"] in [plan["settings"] for plan in result["alternatives"]]
    assert result["assumed"]["tokens_per_sample"] == 1024 and result["assumed"]["gpus_per_node"] == 4


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        # The paper's model on one GPU fits 24 GB; on 8 and 64 it is never the base that fills them.
        (["--gpus-per-node", "1", "--hbm", "24GB"], {"world": 1, "fits": True}),
        (["--train.global_batch_size", "64"], {"world": 8, "fits": True}),
        (["--nodes", "8", "--train.global_batch_size", "256"], {"world": 64, "fits": True}),
    ],
)
def test_worked_examples_of_llama2_7b(arguments: list[str], facts: dict[str, Any]) -> None:
    result = plan(*arguments)
    assert result["assumed"]["nodes"] * result["assumed"]["gpus_per_node"] == facts["world"]
    assert result["trainable_parameters"] == 158_859_264
    assert result["fits"] is facts["fits"]
    parts = facts["world"]
    assert result["bytes_per_rank"]["base_4bit"] == 32 * 202_375_168 * 9 // 16 // parts
    assert result["bytes_per_rank"]["moments"] == 8 * 158_859_264 // parts


@pytest.mark.e2e
def test_worked_examples_of_llama2_70b() -> None:
    """8 GPUs hold it with ZeRO-3 and recomputation; on 512 a replicated 4-bit base is faster than gathering it."""
    model = ["--model", str(RECIPES / "models" / "llama2-70b.json")]
    eight = plan(*model, "--train.global_batch_size", "32")
    many = plan(*model, "--nodes", "64", "--train.global_batch_size", "2048")
    assert eight["fits"] and many["fits"]
    assert (
        eight["trainable_parameters"]
        == many["trainable_parameters"]
        == 80 * (40 * 69_632 + 96 * 75_776 + 6 * 8 * 12 * 32)
    )
    assert many["bytes_per_rank"]["base_4bit"] < eight["bytes_per_rank"]["base_4bit"] / 60
    fastest = next(plan for plan in many["alternatives"] if plan["fits"])
    assert fastest["settings"]["parallel.zero_stage"] < 3
    assert many["seconds_per_step"]["base_gather"] > eight["seconds_per_step"]["base_gather"]


def test_tables_name_every_kind_that_costs(capsys: pytest.CaptureFixture[str]) -> None:
    switches = ["--parallel.ep_size", "2", "--adapter.task_conflict", "project"]
    assert run(RECIPE, "--model", MODEL, *switches, "--tokens-per-sample", "200") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "6.74 B base, 158,859,264 trained; 1 x 4 GPUs" in out and "4 samples x 200 tokens" in out
    for name in KINDS.values():
        assert name in out
    assert "this recipe" in out and "fastest that fits" in out and "Moving" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model path/to/config.json"),
        (["--model", MODEL, "--hbm", "80"], None),
        (["--model", MODEL, "--hbm", "much"], "--hbm='much' must be a size such as 80GiB"),
        (["--model", MODEL, "--intra", "400Gb/s"], "--intra='400Gb/s' must be bytes a second"),
        (["--model", MODEL, "--gpus-per-node", "3"], "cannot be split"),
        (
            ["--model", MODEL, "--adapter.target_modules", "qq_proj"],
            "'qq_proj' is not one of the linear layers of a block",
        ),
        (["--model", MODEL, "--parallel.ep_size", "3"], "parallel.ep_size=3 must divide"),
        (["--model", MODEL, "--targets-per-sample", "2000"], "must be at most --tokens-per-sample=1024"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str | None) -> None:
    assert run(RECIPE, *arguments) == (0 if message is None else 2)
    captured = capsys.readouterr()
    if message is not None:
        assert message in " ".join(captured.err.split()) and captured.out == ""
