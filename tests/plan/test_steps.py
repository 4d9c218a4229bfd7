"""Bytes of a step, against what real processes give to DeepSpeed's collectives."""

from dataclasses import replace

import pytest

from malora_dist.plan.run import Run
from malora_dist.plan.steps import flows, step_bytes, uniform_token_bytes, worst_token_bytes
from malora_dist.traffic import exchange_bytes
from tests.plan.conftest import RealRuns
from tests.plan.test_gathers import SHORT
from tests.plan.workers import names_at

# Norms and flags that are not part of any tensor of the model.
SCALARS = 64


def whole_bytes(run: Run, *kinds: str) -> float:
    """Bytes of the whole tensors in the collectives: a ring sends (W - 1) / W of them."""
    return sum(
        flow.nbytes * flow.group / (flow.group - 1) for flow in flows(run) if flow.kind in kinds and flow.group > 1
    )


def in_collectives(sent: dict[str, int], operation: str) -> int:
    return sum(number for name, number in sent.items() if name.startswith(operation))


@pytest.mark.parametrize(
    ("real_runs", "name"), [(world, name) for world in (2, 4) for name in names_at(world)], indirect=["real_runs"]
)
def test_equal_to_what_is_sent(real_runs: RealRuns, name: str) -> None:
    """To the byte where all weights may stay whole after forward, else to 12 %."""
    run = real_runs.plan(name)
    for rank in real_runs.ranks:
        sent = rank[name]["sent"]
        gathered = in_collectives(sent, "all_gather")
        wanted = whole_bytes(run, "weight_gather", "base_gather")
        assert gathered == pytest.approx(wanted, rel=0.12 if name in SHORT else 1e-9)
        reduced = in_collectives(sent, "reduce_scatter" if run.zero_stage == 3 else "all_reduce torch.float32")
        wanted = whole_bytes(run, "gradient_reduce") / (1 if run.zero_stage == 3 else 2)
        if run.expert_group > 1:
            assert abs(reduced - wanted) < SCALARS


def spread(run: Run, ep_size: int) -> Run:
    return replace(run, ep_size=ep_size, world_size=8)


def test_tokens_uniform_and_worst(llama_run: Run) -> None:
    """8 experts, 2 a token, on 8 ranks: uniform routing sends 7/4 rows a token away; the worst sends 7 T sums home."""
    run = spread(llama_run, 8)

    def step(sent: int, received: int) -> int:
        per_layer = [
            exchange_bytes([sent], [received], in_width=32, out_width=width, num_local_experts=1, itemsize=2).total
            for width in (linear.out_features for linear in run.adapted)
        ]
        # Counts go to 7 ranks, not to the one above.
        return run.accumulation * run.shape.num_layers * (sum(per_layer) + len(per_layer) * 6 * 8)

    away = run.tokens * 2 * 7 // 8
    assert uniform_token_bytes(run) == step(away, away)
    assert worst_token_bytes(run) == step(0, 7 * run.tokens)
    assert uniform_token_bytes(spread(run, 1)) == worst_token_bytes(spread(run, 1)) == 0


def test_weights_are_the_gathers_and_the_reductions(llama_run: Run) -> None:
    total = step_bytes(replace(llama_run, world_size=8))
    assert total["weights"] == total["weight_gather"] + total["gradient_reduce"] > 0
    alone = step_bytes(replace(llama_run, world_size=1))
    assert not any(alone.values())
