"""A mixture's best static map, against brute force."""

import pytest
import torch
from torch import Tensor

from malora_dist.convert.calibration import LayerStatistics
from malora_dist.convert.collapse import static_up, truncated
from malora_dist.convert.subspace import Subspace, subspace_of

T, E, R, D, INPUTS, OUTPUTS = 300, 4, 3, 5, 11, 9


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


LAYERS = {
    "malora": {"shared_A": drawn(D, INPUTS), "P": drawn(E, R, D), "B": drawn(E, OUTPUTS, R)},
    "hydralora": {"shared_A": drawn(R, INPUTS), "B": drawn(E, OUTPUTS, R)},
    "molora": {"A": drawn(E, R, INPUTS), "B": drawn(E, OUTPUTS, R)},
}


def routed_sum(method: str, x_TI: Tensor, g_TE: Tensor) -> Tensor:
    """sum_t g_t B_t (P_t S_A or A_t) x, expert by expert."""
    factors = LAYERS[method]
    total = torch.zeros(len(x_TI), OUTPUTS, dtype=torch.float64)
    for expert in range(E):
        down = factors["A"][expert] if method == "molora" else factors["shared_A"]
        if method == "malora":
            down = factors["P"][expert] @ down
        total += g_TE[:, expert, None] * (x_TI @ down.T @ factors["B"][expert].T)
    return total


def statistics_of(space: Subspace, x_TI: Tensor, g_TE: Tensor) -> LayerStatistics:
    h_TD = x_TI @ space.S_DI.T
    gated = torch.stack([(h_TD * g_TE[:, expert, None]).T @ h_TD for expert in range(E)])
    return LayerStatistics(len(x_TI), g_TE.sum(dim=0), h_TD.T @ h_TD, gated)


def inputs() -> tuple[Tensor, Tensor]:
    """Tokens, which are not centred, and top-2 gates that depend on them."""
    x_TI = drawn(T, INPUTS) + 1.5 * drawn(INPUTS, seed=2)
    probs = (x_TI @ drawn(INPUTS, E, seed=1)).softmax(dim=-1)
    kept = probs.topk(2, dim=-1)
    return x_TI, torch.zeros_like(probs).scatter(1, kept.indices, kept.values)


@pytest.mark.parametrize("method", LAYERS)
def test_subspace_is_the_layer(method: str) -> None:
    space = subspace_of(LAYERS[method])
    x_TI, g_TE = inputs()
    found = torch.einsum("te,eor,erd,td->to", g_TE, space.B_EOR, space.P_ERD, x_TI @ space.S_DI.T)
    torch.testing.assert_close(found, routed_sum(method, x_TI, g_TE))


@pytest.mark.parametrize("method", LAYERS)
def test_constant_gates_collapse_exactly(method: str) -> None:
    space = subspace_of(LAYERS[method])
    x_TI, _ = inputs()
    g_TE = torch.tensor([0.4, 0.0, 0.25, 0.1], dtype=torch.float64).expand(T, E)
    for fit in ("mean", "lstsq"):
        L_OD = static_up(space, statistics_of(space, x_TI, g_TE), fit)
        torch.testing.assert_close(x_TI @ (L_OD @ space.S_DI).T, routed_sum(method, x_TI, g_TE), atol=1e-11, rtol=0)


@pytest.mark.parametrize("method", LAYERS)
def test_lstsq_is_the_best_static_map_on_the_calibration_tokens(method: str) -> None:
    space = subspace_of(LAYERS[method])
    x_TI, g_TE = inputs()
    statistics, wanted = statistics_of(space, x_TI, g_TE), routed_sum(method, x_TI, g_TE)
    h_TD = x_TI @ space.S_DI.T

    def residual(L_OD: Tensor) -> float:
        return (wanted - h_TD @ L_OD.T).square().mean().item()

    best = torch.linalg.lstsq(h_TD, wanted, driver="gelsd").solution.T
    mean, lstsq = static_up(space, statistics, "mean"), static_up(space, statistics, "lstsq")
    assert residual(best) <= residual(lstsq) < 1.0001 * residual(best) < 0.97 * residual(mean)
    for ridge in (1e-2, 1.0, 100.0):
        damped = residual(static_up(space, statistics, "lstsq", ridge))
        assert residual(best) < damped <= residual(mean)
    assert residual(static_up(space, statistics, "lstsq", 1e9)) == pytest.approx(residual(mean), rel=1e-6)


def test_a_layer_that_sees_only_zeros_keeps_its_mean() -> None:
    space = subspace_of(LAYERS["malora"])
    _, g_TE = inputs()
    statistics = statistics_of(space, torch.zeros(T, INPUTS, dtype=torch.float64), g_TE)
    assert torch.equal(static_up(space, statistics, "lstsq"), static_up(space, statistics, "mean"))


@pytest.mark.parametrize("rank", range(1, D + 1))
def test_truncation_is_the_svd_of_the_whole_product(rank: int) -> None:
    L_OD, S_DI = drawn(OUTPUTS, D, seed=5), drawn(D, INPUTS, seed=6)
    left, right, lost = truncated(L_OD, S_DI, rank)
    assert left.shape == (OUTPUTS, rank) and right.shape == (rank, INPUTS)
    U, sigma, Vh = torch.linalg.svd(L_OD @ S_DI)
    torch.testing.assert_close(left @ right, (U[:, :rank] * sigma[:rank]) @ Vh[:rank])
    assert lost == pytest.approx((sigma[rank:].norm() / sigma.norm()).item(), abs=1e-12)
