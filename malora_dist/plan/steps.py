"""Bytes a rank sends in one optimizer step, by what travels and over which group.

A ring of W ranks moves (W - 1) / W of the whole tensor for a gather or a reduce-scatter, and twice that for an
all-reduce. What a rank receives is as much.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from malora_dist.plan.communication import exchange_bytes, rows_per_token
from malora_dist.plan.gathers import gathers_per_micro_batch
from malora_dist.plan.parameters import FP32, flat_groups, persists, stored_tensors
from malora_dist.plan.run import Run
from malora_dist.plan.shapes import Linear

KINDS = ("tokens", "weight_gather", "gradient_reduce", "base_gather")


@dataclass(frozen=True)
class Flow:
    """Bytes of one kind that a rank sends in a step, in groups of `group` ranks, `stride` apart."""

    kind: str
    nbytes: float
    group: int
    stride: int = 1


def flows(run: Run) -> list[Flow]:
    """Return all traffic of a step that grows with the model or the tokens."""
    return [*_exchange(run), *(_zero3(run) if run.zero_stage == 3 else _replicated(run))]


def step_bytes(run: Run) -> dict[str, int]:
    """Count the bytes that a rank sends in a step by kind, and `weights`, all that is sent for the trained tensors."""
    total = dict.fromkeys(KINDS, 0.0)
    for flow in flows(run):
        total[flow.kind] += flow.nbytes
    result = {kind: round(number) for kind, number in total.items()}
    return result | {"weights": result["weight_gather"] + result["gradient_reduce"]}


def worst_token_bytes(run: Run) -> int:
    """Count the bytes that the busiest rank sends for tokens under the worst routing.

    Either all k experts of every token are on other ranks, or all tokens of the expert-parallel group go to one rank,
    which returns every sum.
    """
    others, T = run.ep_size - 1, run.tokens
    if others == 0:
        return 0
    away = min(run.spec.top_k, others) * T
    scattered = [away // others + (1 if rank < away % others else 0) for rank in range(others)]
    return max(_token_bytes(run, scattered, scattered), _token_bytes(run, [0] * others, [T] * others))


def uniform_token_bytes(run: Run) -> int:
    """Count the bytes that a rank sends for tokens if every set of top_k experts is equally likely."""
    others = run.ep_size - 1
    if others == 0:
        return 0
    spec = run.spec
    rows = [round(run.tokens * rows_per_token(spec.num_experts, spec.top_k, run.ep_size) / run.ep_size)] * others
    return _token_bytes(run, rows, rows)


def _token_bytes(run: Run, sent: list[int], received: list[int]) -> int:
    def layer(linear: Linear) -> int:
        return exchange_bytes(
            sent,
            received,
            in_width=run.spec.expert_width(linear.in_features),
            out_width=linear.out_features,
            num_local_experts=run.num_local_experts,
            itemsize=run.itemsize,
            recompute=run.checkpointing,
        ).total

    return run.accumulation * sum(run.shape.copies(linear) * layer(linear) for linear in run.adapted)


def _exchange(run: Run) -> Iterator[Flow]:
    if run.ep_size > 1:
        yield Flow("tokens", uniform_token_bytes(run), run.ep_size)


def _zero3(run: Run) -> Iterator[Flow]:
    """Yield gathers in each micro-batch and reduce-scatters of gradients after it; small tensors gather once a step."""
    for tensor in stored_tensors(run):
        stride = run.world_size // tensor.group
        once = tensor.copies * tensor.part * (tensor.group - 1) * tensor.itemsize
        times = 1.0 if persists(run, tensor) else run.accumulation * gathers_per_micro_batch(run, tensor)
        yield Flow("weight_gather" if tensor.trained else "base_gather", times * once, tensor.group, stride)
        if tensor.trained:
            yield Flow("gradient_reduce", run.accumulation * once, tensor.group, stride)


def _replicated(run: Run) -> Iterator[Flow]:
    """Yield all-reduces of gradients, one a step (ZeRO-2: one a micro-batch); ZeRO-1 and 2 gather the new weights."""
    reductions = run.accumulation if run.zero_stage == 2 else 1
    for flat in flat_groups(run):
        once = FP32 * flat.numel * (flat.group - 1) / flat.group
        yield Flow("gradient_reduce", reductions * 2 * once, flat.group, flat.stride)
        if run.zero_stage > 0:
            yield Flow("weight_gather", once, flat.group, flat.stride)
