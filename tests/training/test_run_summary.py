"""What a run logs about itself, as users read it."""

from pathlib import Path

from malora_dist.adapters.inject import InjectionReport, InjectionRow
from malora_dist.config import load_config
from malora_dist.training.run_summary import injection_lines, next_steps, placement_lines
from tests.config.recipes import RECIPES


def test_adapted_modules_and_their_share() -> None:
    rows = (InjectionRow("q_proj", 4, 64, 32, 12345), InjectionRow("down_proj", 4, 128, 64, 1))
    report = InjectionReport(rows, 12346, 200_000, 150_000, 50_000, fused_experts=("a.experts", "b.experts"))
    assert list(injection_lines(report)) == [
        "adapted   4 x q_proj        64 -> 32          12,345 trainable",
        "adapted   4 x down_proj    128 -> 64               1 trainable",
        "trainable 12,346 of 200,000 base parameters (6.17 %); 4-bit: 25.0 % of the base, adapted: 75.0 %",
        "not adapted: experts that are stored as one parameter, not as linear layers, a.experts and 1 more",
    ]


def test_weights_experts_and_steps() -> None:
    resident = {"base": 3 * 2**20, "adapter": 2**19}
    alone, steps = placement_lines(load_config(RECIPES / "demo.yaml"), resident, 90, 12.25)
    spread = load_config(RECIPES / "demo.yaml", ["--parallel.ep_size=2", "--adapter.num_experts=8"])
    assert list(placement_lines(spread, resident, 90, 12.25)) == [
        alone,
        "expert parallelism: groups of 2 processes exchange tokens, each holds 4 of 8 experts of a layer",
        steps,
    ]
    assert alone.endswith(": this process keeps 3.0 MiB of base and 0.5 MiB of adapter weights")
    assert steps == "training for 90 steps, 12.2 steps an epoch"


def test_a_base_whose_code_runs_is_evaluated_with_its_key() -> None:
    run = Path("runs/a")
    assert "malora evaluate runs/a     evaluates" in next_steps(run, trust_remote_code=False)
    assert "malora evaluate runs/a --model.trust_remote_code true" in next_steps(run, trust_remote_code=True)
