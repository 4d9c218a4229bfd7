"""The router against the naive twin, and where floating point could change a decision."""

import pytest
import torch

from malora_dist.ops.routing import Routing, route
from tests.cases import ADAPTER_CASES, AdapterCase, make_inputs
from tests.reference import gradients, routing_reference

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("case", ADAPTER_CASES)
@pytest.mark.parametrize("normalize", [False, True])
def test_route_equals_the_twin(case: AdapterCase, normalize: bool) -> None:
    tensors = make_inputs(case, "molora")
    leaves = [tensors["x"], tensors["gate"]]
    ours = route(*leaves, case.K, normalize)
    gates, ids, probs = routing_reference(*leaves, case.K, normalize)
    assert torch.equal(ours.expert_ids_TK, ids)
    pair, expected_pair = torch.cat([ours.gates_TK, ours.probs_TE], dim=1), torch.cat([gates, probs], dim=1)
    torch.testing.assert_close(pair, expected_pair, **CLOSE)
    direction = torch.randn(pair.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for got, want in zip(gradients(pair, leaves, direction), gradients(expected_pair, leaves, direction), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    scattered = torch.zeros_like(probs).scatter(1, ids, gates)
    torch.testing.assert_close(ours.gates_TE, scattered, **CLOSE)


def test_bf16_input_is_routed_in_fp32() -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    ours, exact = route(x, gate, 2), route(x.float(), gate, 2)
    assert ours.gates_TK.dtype == ours.probs_TE.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], exact[:3], strict=True))
    assert not torch.equal(ours.probs_TE, route(x.float(), gate.bfloat16().float(), 2).probs_TE)
    # Logits 1 and 1 + 2^-10 are one number in bf16, which would be a tie.
    ones, near = torch.ones(3, 1).bfloat16(), torch.tensor([[1.0], [1 + 2**-10]])
    assert route(ones, near, 1).expert_ids_TK.tolist() == [[1]] * 3


def _route_logits(logits: torch.Tensor, top_k: int, normalize: bool = False) -> Routing:
    return route(logits, torch.eye(logits.shape[1]), top_k, normalize)


@pytest.mark.parametrize("num_experts", [4, 64])  # some sorts keep the order of equal values only for short rows
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_logits_take_experts_in_their_order(num_experts: int, top_k: int) -> None:
    routing = _route_logits(torch.zeros(300, num_experts), top_k)
    assert routing.expert_ids_TK.tolist() == [list(range(top_k))] * 300
    torch.testing.assert_close(routing.gates_TK, torch.full((300, top_k), 1 / num_experts))


def test_ties_go_to_the_lower_number_behind_larger_ones() -> None:
    routing = _route_logits(torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, 1.0, 0.0, 5.0, 1.0]]), 2)
    assert routing.expert_ids_TK.tolist() == [[1, 2], [3, 1]]


def test_all_experts_keep_the_whole_softmax() -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    routing = _route_logits(logits, 5)
    assert torch.equal(routing.gates_TE, routing.probs_TE)
    torch.testing.assert_close(routing.probs_TE, logits.softmax(dim=1))
    torch.testing.assert_close(_route_logits(logits, 5, normalize=True).gates_TK, routing.gates_TK)


def test_only_normalized_gates_sum_to_one() -> None:
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert bool((_route_logits(logits, 2).gates_TK.sum(dim=1) < 0.999).all())
    torch.testing.assert_close(_route_logits(logits, 2, normalize=True).gates_TK.sum(dim=1), torch.ones(20))
