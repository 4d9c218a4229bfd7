from dataclasses import replace
from pathlib import Path

from malora_dist.report.facts import Fact, key_facts, run_facts, training_seconds
from malora_dist.report.inputs import RunFiles, read_run
from tests.report.run_folder import write_run


def test_each_record_counts_for_its_steps() -> None:
    records = [{"step": 1, "step_seconds": 9.0}, {"step": 10, "step_seconds": 2.0}, {"step": 13, "step_seconds": 1.0}]
    assert training_seconds(RunFiles(name="r", train=records)) == 9 + 9 * 2 + 3 * 1


def test_facts_come_from_the_adapter_first_and_unknown_ones_are_left_out(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "demo"))
    facts = {name: fact.value for name, fact in run_facts(run).items()}
    assert facts["method"] == "malora: num_experts 8, top_k 2, r 12, shared_r 32, lora_alpha 24"
    assert facts["processes"] == "2 on cpu" and facts["ZeRO stage"] == "3" and "16 samples" in facts["batch"]
    assert key_facts(run)["trainable parameters"] == Fact("4,321,000", "3.22 % of the base")
    assert run_facts(replace(run, adapter={}))["method"].value == "malora: num_experts 8, top_k 2, r 12"
    assert "processes" not in run_facts(replace(run, run={}))
    assert run_facts(RunFiles(name="r")) == {} and key_facts(RunFiles(name="r")) == {}


def test_zero_stage_0_is_a_fact() -> None:
    assert run_facts(RunFiles(name="r", config={"parallel": {"zero_stage": 0}})) == {"ZeRO stage": Fact("0")}
