"""Initial values against eqs. 8-10 and against torch's Kaiming-uniform."""

import math

import pytest
import torch

from malora_dist.ops.init import kaiming_uniform, shared_subspace_init
from tests.reference import init_reference, kaiming_reference


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kaiming_uniform_is_that_of_torch_with_a_sqrt_5() -> None:
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(40, 300), a=math.sqrt(5), generator=_generator())
    torch.testing.assert_close(kaiming_uniform((40, 300), fan_in=300, generator=_generator()), theirs)
    stacked = kaiming_uniform((5, 8, 300), fan_in=300, generator=_generator())
    torch.testing.assert_close(stacked, theirs.view(5, 8, 300))  # fan_in is the input width, not what torch would guess


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_shared_subspace_is_eqs_8_to_10(beta: float) -> None:
    n, d, r = 96, 16, 6
    K_EDI = kaiming_reference(5, d, n, seed=1)
    shared_A, P = shared_subspace_init(K_EDI, r, beta)
    expected_A, expected_P = init_reference(K_EDI, r, beta)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(P[0] @ shared_A, K_EDI[0, :r], **close)
    whole_P = shared_subspace_init(K_EDI, d, beta)[1]
    assert torch.equal(whole_P.amax(dim=1), whole_P.abs().amax(dim=1))
    # The twin's signs of singular vectors are those of a library.
    torch.testing.assert_close(shared_A.abs(), expected_A.abs(), **close)
    torch.testing.assert_close(P.abs(), expected_P.abs(), **close)
    K_gram = K_EDI[:, :r] @ K_EDI[:, :r].transpose(1, 2)
    torch.testing.assert_close(P @ P.transpose(1, 2) * beta**2, K_gram, **close)


@pytest.mark.parametrize("beta", [0.3, 1.0, 1.25, 5.0])
def test_every_expert_starts_with_the_variance_of_kaiming(beta: float) -> None:
    n, d, r = 1024, 32, 12
    K_EDI = kaiming_uniform((8, d, n), fan_in=n, generator=_generator())
    shared_A, P = shared_subspace_init(K_EDI, r, beta)
    torch.testing.assert_close(P[0] @ shared_A, K_EDI[0, :r], rtol=1e-4, atol=1e-6)
    for t, product in enumerate(P @ shared_A):
        assert product.var().item() == pytest.approx(1 / (3 * n), rel=0.04), f"expert {t}"
    assert shared_A.var().item() == pytest.approx(beta**2 / n, rel=0.02)


@pytest.mark.parametrize(("d", "n"), [(64, 65), (80, 80)])
def test_a_basis_as_wide_as_the_input_stays_orthogonal(d: int, n: int) -> None:
    """The singular values of such a matrix reach far down, and their squares are what is computed."""
    K_EDI = kaiming_uniform((2, d, n), fan_in=n, generator=_generator())
    shared_A, P = shared_subspace_init(K_EDI, d, 1.0)
    torch.testing.assert_close(shared_A @ shared_A.T, torch.eye(d), rtol=0, atol=1e-6)
    torch.testing.assert_close(P[0] @ shared_A, K_EDI[0], rtol=0, atol=1e-6)


def test_initial_values_depend_on_the_generator_alone() -> None:
    """Not on default device, default dtype or the number of threads."""

    def values() -> list[torch.Tensor]:
        K_EDI = kaiming_uniform((2, 64, 300), fan_in=300, generator=_generator())
        return [K_EDI, *shared_subspace_init(K_EDI, 6, 1.25), *shared_subspace_init(K_EDI.double(), 6, 1.25)]

    threads = torch.get_num_threads()
    expected = values()
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in expected[:3])
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        with torch.device("meta"):
            found = values()
        assert torch.get_num_threads() != threads
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
