"""The balance loss against the naive twin: masks, groups, shares of ranks, gradients."""

import pytest
import torch
from torch import Tensor

from malora_dist.ops.balance import expert_statistics, load_balancing_loss
from malora_dist.ops.routing import Routing
from tests.reference import balance_reference, gradients

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
L, E = 3, 5


def _routings(T: int, K: int, seed: int = 0) -> list[Routing]:
    generator = torch.Generator().manual_seed(seed)
    routings = []
    for _ in range(L):
        probs_TE = torch.randn(T, E, generator=generator, dtype=torch.float64).softmax(dim=1).requires_grad_()
        ids_TK = probs_TE.detach().topk(K, dim=1).indices
        routings.append(Routing(probs_TE.gather(1, ids_TK), ids_TK, probs_TE))
    return routings


def _slice(routing: Routing, tokens: slice) -> Routing:
    return Routing(*(part[tokens] for part in routing[:3]))


def _loss(routings: list[Routing], mask_T: Tensor | None = None) -> Tensor:
    K = routings[0].expert_ids_TK.shape[1]
    statistics = expert_statistics(routings, mask_T=mask_T)
    counts_LE = statistics.counts_GLE.sum(dim=0)
    return load_balancing_loss(counts_LE, statistics.prob_sum_LE, counts_LE[0].sum() / K, K)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("K", [1, 2, E])
@pytest.mark.parametrize("T", [0, 1, 17])
def test_loss_equals_the_twin(T: int, K: int, masked: bool) -> None:
    routings = _routings(T, K)
    mask = torch.rand(T, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    probs = [routing.probs_TE for routing in routings]
    ours = _loss(routings, mask)
    expected = torch.stack([balance_reference(r.probs_TE, r.expert_ids_TK, mask) for r in routings])
    torch.testing.assert_close(ours, expected, **CLOSE)
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for got, want in zip(gradients(ours, probs, direction), gradients(expected, probs, direction), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
        if mask is not None:
            assert not got[~mask].any()


@pytest.mark.parametrize("K", [1, 2, E])
def test_perfect_balance_is_one_and_collapse_is_its_probability(K: int) -> None:
    uniform = torch.full((E, E), 1 / E, dtype=torch.float64)
    ids = torch.tensor([[(t + k) % E for k in range(K)] for t in range(E)])
    torch.testing.assert_close(_loss([Routing(uniform[:, :K], ids, uniform)] * L), torch.ones(L).double(), **CLOSE)
    certain = torch.eye(E, dtype=torch.float64)[:1].expand(4, -1)
    collapsed = Routing(certain[:, :1], torch.zeros(4, 1, dtype=torch.int64), certain)
    assert _loss([collapsed]).item() == E


def test_counts_are_those_of_each_group_and_mask() -> None:
    T, K, G = 40, 2, 4
    routings = _routings(T, K)
    generator = torch.Generator().manual_seed(3)
    group_T = torch.randint(G - 1, (T,), generator=generator)  # the last group has no token
    mask_T = torch.rand(T, generator=generator) < 0.7
    counts, prob_sum, _ = expert_statistics(routings, group_T, G, mask_T)
    expected = torch.zeros(G, L, E, dtype=torch.float64)
    for layer, routing in enumerate(routings):
        for t in range(T):
            for e in routing.expert_ids_TK[t].tolist():
                expected[group_T[t], layer, e] += float(mask_T[t])
    assert torch.equal(counts, expected)
    assert not counts.requires_grad
    torch.testing.assert_close(prob_sum, torch.stack([r.probs_TE[mask_T].sum(dim=0) for r in routings]), **CLOSE)


@pytest.mark.parametrize("cut", [0, 5, 16])
def test_shares_over_ranks_add_up_to_the_loss_of_one_process(cut: int) -> None:
    """Also their gradients, and also when a rank has no token; the mean of the ranks' own losses is another number."""
    T, K = 16, 2
    routings = _routings(T, K)
    probs = [routing.probs_TE for routing in routings]
    halves = [[_slice(r, part) for r in routings] for part in (slice(0, cut), slice(cut, T))]
    statistics = [expert_statistics(half) for half in halves]
    counts_LE = sum(s.counts_GLE.sum(dim=0) for s in statistics)
    shares = [load_balancing_loss(counts_LE, s.prob_sum_LE, T, K) for s in statistics]
    whole = _loss(routings)
    torch.testing.assert_close(shares[0] + shares[1], whole, **CLOSE)
    ones = torch.ones_like(whole)
    for got, want in zip(gradients(sum(shares), probs, ones), gradients(whole, probs, ones), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    if cut == 5:
        assert not torch.allclose((_loss(halves[0]) + _loss(halves[1])) / 2, whole, rtol=1e-3)
