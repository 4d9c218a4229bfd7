"""Bytes of a step, of tokens under two routings and of weights. Those of real runs are in test_real_runs."""

from dataclasses import replace

from malora_dist.plan.communication import exchange_bytes
from malora_dist.plan.run import Run
from malora_dist.plan.steps import step_bytes, uniform_token_bytes, worst_token_bytes


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
