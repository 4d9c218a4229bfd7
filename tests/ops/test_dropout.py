"""Keyed dropout: the right rate, no visible pattern, and a mask that only its key decides."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from malora_dist.ops.dropout import dropout_mask, keyed_dropout, token_keys

T, I = 512, 768  # noqa: E741


def _keys(num_tokens: int = T, *, seed: int = 42, step: int = 7, sample: int = 3, start: int = 0) -> Tensor:
    return token_keys(seed, step, torch.full((num_tokens,), sample), torch.arange(start, start + num_tokens))


def _correlation(one: Tensor, other: Tensor) -> float:
    """Correlation of two masks in standard errors: N(0, 1) if they are independent."""
    joint = torch.stack([one.double().flatten(), other.double().flatten()])
    return float(torch.corrcoef(joint)[0, 1]) * math.sqrt(one.numel())


@pytest.mark.parametrize("p", [1e-11, 0.05, 0.25, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    x = torch.ones(T, I)
    y = keyed_dropout(x, _keys(), salt=11, p=p)
    kept = y != 0
    step = 2**-16  # of p
    error = math.sqrt(max(p, step) * (1 - p) / x.numel())
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=4 * error + step)
    torch.testing.assert_close(y[kept], torch.full((int(kept.sum()),), 1 / (1 - p)))
    assert torch.equal(kept, dropout_mask(_keys(), 11, I, p).bool())


def test_mask_depends_on_sample_and_position_alone() -> None:
    """Sample 5 alone, and as the second half of one row, and as the third sample of another one."""
    alone = dropout_mask(_keys(20, sample=5), 1, 64, 0.5).bool()
    samples = torch.tensor([9] * 7 + [2] * 4 + [5] * 20 + [11] * 3)
    positions = torch.cat([torch.arange(n) for n in (7, 4, 20, 3)])
    packed = dropout_mask(token_keys(42, 7, samples, positions), 1, 64, 0.5).bool()
    assert torch.equal(packed[11:31], alone)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    shuffled = dropout_mask(token_keys(42, 7, samples[order], positions[order]), 1, 64, 0.5).bool()
    assert torch.equal(shuffled, packed[order])
    assert torch.equal(dropout_mask(_keys(20, sample=5), 1, 47, 0.5).bool(), alone[:, :47])


NEIGHBOURS = {
    "none": {},
    "step": {"step": 8},
    "later step": {"step": 7 + 1000},
    "seed": {"seed": 43},
    "sample": {"sample": 4},
    "position": {"start": 1},
    "distant position": {"start": 256},
}
SALTS = [11, 12, 13, 0, 11 + 2**16, 2**31 - 1]


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_masks_of_neighbouring_keys_and_salts_are_independent(p: float) -> None:
    """Each against the first, and against each other: one step more must not stand for one salt more, say."""
    masks = {f"{what} changed": dropout_mask(_keys(**change), 11, I, p).bool() for what, change in NEIGHBOURS.items()}
    masks |= {f"salt {salt}": dropout_mask(_keys(), salt, I, p).bool() for salt in SALTS[1:]}
    for (one, mask), (other, another) in combinations(masks.items(), 2):
        assert abs(_correlation(mask, another)) < 5, f"{one} and {other}"


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("salt", SALTS)
def test_a_salt_moves_no_mask_along(salt: int, p: float) -> None:
    """The mask of one layer input is not that of another one some tokens or features further on."""
    one, other = dropout_mask(_keys(), 11, I, p).bool(), dropout_mask(_keys(), salt, I, p).bool()
    for shift in (1, 2, 3):
        assert abs(_correlation(one[shift:], other[:-shift])) < 5
        assert abs(_correlation(one[:-shift], other[shift:])) < 5
        assert abs(_correlation(one[:, shift:], other[:, :-shift])) < 5
        assert abs(_correlation(one[:, :-shift], other[:, shift:])) < 5


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("lines_are", ["tokens", "features"])
def test_no_two_lines_of_a_mask_look_alike(lines_are: str, p: float) -> None:
    """All 32,640 pairs of 256 lines of 4,096: of independent ones, no correlation is beyond 7 standard errors.

    Nor is a line kept more often than chance allows.
    """
    n = 4096
    mask = (
        dropout_mask(_keys(256), 11, n, p).bool()
        if lines_are == "tokens"
        else dropout_mask(_keys(n), 11, 256, p).bool().T
    )
    correlations = torch.corrcoef(mask.double()) * math.sqrt(n)
    assert float((correlations - correlations.diag().diag()).abs().max()) < 7
    rates = (mask.double().mean(dim=1) - (1 - p)) / math.sqrt(p * (1 - p) / n)
    assert float(rates.abs().max()) < 5
    assert float(rates.var()) == pytest.approx(1, abs=0.35)


def test_gradient_has_the_mask_of_forward_and_no_mask_is_stored() -> None:
    x = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    keys = _keys(40)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y = keyed_dropout(x, keys, salt=5, p=0.4)
    (got,) = torch.autograd.grad(y, x, gradient)
    mask = dropout_mask(keys, 5, 30, 0.4).bool()
    assert torch.equal(y, x * mask / 0.6)
    assert torch.equal(got, gradient * mask / 0.6)
    assert [tensor.shape for tensor in saved] == [(40,)]
