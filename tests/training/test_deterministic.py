"""train.deterministic: what is switched on, and what is said where an operation has no deterministic form."""

import os
from collections.abc import Iterator

import pytest
import torch

from malora_dist.errors import TrainingError
from malora_dist.training.deterministic import explained, use_deterministic_algorithms


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("deterministic")
def test_an_operation_without_a_deterministic_form_ends_the_run_by_name() -> None:
    use_deterministic_algorithms()
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(TrainingError, match=r"^train\.deterministic=true: put_ has no deterministic form"), explained():
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
    with pytest.raises(RuntimeError, match="must match the size"), explained():
        torch.zeros(4) + torch.zeros(3)


@pytest.mark.usefixtures("deterministic")
def test_the_users_workspace_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_algorithms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
