"""Tokens copied to rows and added up again, in one process."""

import pytest
import torch
from torch import Tensor

from malora_dist.distributed.dispatch_plan import expert_rank_mask
from malora_dist.distributed.permutation import Permutation, permutations, sum_rows

# T, E, K, W
PLACES = {
    "plain": (7, 8, 2, 4),
    "no-token": (0, 8, 2, 4),
    "one-token": (1, 4, 3, 4),
    "one-slot": (6, 8, 1, 4),
    "one-rank": (5, 3, 2, 1),
    "every-rank": (4, 4, 4, 4),
    "first-slot-only": (5, 8, 2, 2),
}


def _order(name: str) -> Permutation:
    T, E, K, W = PLACES[name]
    generator = torch.Generator().manual_seed(3)
    ids_TK = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K]
    if name == "first-slot-only":  # both experts of each token on one rank, not the same for all
        ids_TK = torch.tensor([0, 4])[torch.arange(T) % 2][:, None] + torch.arange(K)
    mask_WLT = expert_rank_mask(ids_TK[None], E, W)
    (order,) = permutations(mask_WLT.transpose(0, 1), [int(mask_WLT.sum())], min(K, W))
    return order


def _normal(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.requires_grad_()


@pytest.mark.parametrize("name", PLACES)
def test_a_token_is_the_base_plus_the_sum_of_its_rows(name: str) -> None:
    order = _order(name)
    T, N = len(order.row_TQ), len(order.token_N)
    rows, base, x = _normal(N, 3), _normal(T, 3, seed=1), _normal(T, 3, seed=2)
    if name == "first-slot-only":
        assert bool((order.row_TQ[:, 1:] == N).all())
    sums = torch.zeros(T, 3, dtype=torch.float64)
    for row, token in enumerate(order.token_N.tolist()):
        sums[token] += rows.detach()[row]
    torch.testing.assert_close(sum_rows(rows, order.row_TQ), sums)
    torch.testing.assert_close(order.unpermute(base, rows), base + sums)
    permuted = order.permute(x)
    assert permuted.tolist() == [x[token].tolist() for token in order.token_N]


@pytest.mark.parametrize("name", PLACES)
def test_gradients_equal_finite_differences(name: str) -> None:
    order = _order(name)
    T, N = len(order.row_TQ), len(order.token_N)
    rows, base, x = _normal(N, 3), _normal(T, 3, seed=1), _normal(T, 3, seed=2)
    assert torch.autograd.gradcheck(lambda rows, base: sum_rows(rows, order.row_TQ, base), (rows, base))
    assert torch.autograd.gradcheck(order.permute, (x,))
    assert torch.autograd.gradcheck(order.unpermute, (base, rows))


def test_bf16_rows_are_added_in_fp32() -> None:
    """In bf16 256 + 1 is 256, so that adding row by row would stay there."""
    rows, base = torch.ones(2, 1).bfloat16(), torch.full((1, 1), 256.0).bfloat16()
    total = sum_rows(rows, torch.tensor([[0, 1]]), base)
    assert total.dtype == torch.bfloat16 and total.item() == 258
