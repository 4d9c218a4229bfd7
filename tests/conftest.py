"""Where tests compute."""

import pytest
import torch

from tests.devices import hide_gpus

pytest_plugins = ["tests.tiers", "tests.limits"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option of the long form of tests that draw what they do at random."""
    parser.addoption("--soak", action="store_true", help="draw more signals, kills and moments than usual")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `pytest -m gpu`, before any of their modules is imported."""
    if config.option.markexpr != "gpu":
        hide_gpus()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where none is to be seen."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m gpu, on a machine with one"))
