import pytest
import torch

from malora_dist.bench.local.equal_work import check_losses, check_outputs


def test_outputs() -> None:
    y = torch.tensor([3.0, -4.0])
    # Of the shapes one broadcasts and one does not.
    check_outputs({"base": y, "same": y + 1e-5}, torch.float32)
    for wrong in (y + 1e-2, y[:1], torch.ones(3), y * float("nan")):
        with pytest.raises(RuntimeError, match="other does other work than base"):
            check_outputs({"base": y, "other": wrong}, torch.float32)


def test_losses() -> None:
    check_losses({"base": 2.0, "same": 2.0 + 1e-5}, torch.float32)
    for wrong in (2.1, float("nan")):
        with pytest.raises(RuntimeError, match="other does other work than base"):
            check_losses({"base": 2.0, "other": wrong}, torch.float32)
