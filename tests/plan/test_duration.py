"""Operations and link speeds, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from malora_dist.plan.duration import Hardware, spans_nodes, step_flops, step_seconds
from malora_dist.plan.run import Run
from malora_dist.plan.steps import Flow, step_bytes

TWO_NODES = Hardware(nodes=2, gpus_per_node=4, intra=400e9, inter=10e9, flops=1e14)


def test_operations_of_llama2_7b(llama_run: Run) -> None:
    """4 T times the base's 6.6e9 products, 6 T times the adapters', attention and head: about 4 T x 6.9e9."""
    run, T = llama_run, llama_run.tokens
    base, adapters = 6_476_005_376, 158_859_264
    attention = 3 * 32 * 4 * (run.micro_batch * run.tokens_per_sample**2 / 2) * 4096
    wanted = 4 * T * base + 6 * T * adapters + attention + 4 * T * 32000 * 4096
    assert step_flops(run) == pytest.approx(run.accumulation * wanted, rel=1e-9)
    again = replace(run, checkpointing=True)
    more = 2 * T * (base + adapters) + attention / 3
    assert step_flops(again) - step_flops(run) == pytest.approx(run.accumulation * more, rel=1e-9)


def test_one_sample_needs_no_mask(llama_run: Run) -> None:
    """Four samples packed in one masked row cost 4 x 4 of one sample's scores, and 2 x that without causality."""
    one = replace(llama_run, micro_batch=1, accumulation=1, attention="sdpa")
    packed = replace(one, micro_batch=4)
    assert step_flops(replace(packed, attention="varlen")) == pytest.approx(4 * step_flops(one), rel=1e-9)
    attention = 3 * 32 * 4 * one.tokens**2 / 2 * 4096
    assert step_flops(packed) - 4 * step_flops(one) == pytest.approx((2 * 16 - 4) * attention, rel=1e-9)


@pytest.mark.parametrize(
    ("group", "stride", "spans"),
    [(8, 1, True), (4, 1, False), (2, 1, False), (8, 1, True), (4, 2, True), (2, 4, True), (1, 8, True)],
)
def test_a_strided_group_leaves_its_node(group: int, stride: int, spans: bool) -> None:
    assert spans_nodes(Flow("tokens", 1.0, group, stride), TWO_NODES) == spans


def test_the_slower_link_carries_what_spans_nodes(llama_run: Run) -> None:
    run = replace(llama_run, world_size=8, ep_size=4)
    seconds, sent = step_seconds(run, TWO_NODES), step_bytes(run)
    assert seconds["tokens"] == pytest.approx(sent["tokens"] / 400e9)
    assert seconds["base_gather"] == pytest.approx(sent["base_gather"] / 10e9)
    assert seconds["compute"] == step_flops(run) / 1e14
    assert seconds["total"] == pytest.approx(sum(value for name, value in seconds.items() if name != "total"))
