"""Where tests compute, and a small model with everything a large one has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.devices import hide_gpus

LlamaFactory = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add an option of the long form of tests that draw what they do at random."""
    parser.addoption("--soak", action="store_true", help="draw more signals, kills and moments than usual")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `pytest -m gpu`, before any of their modules is imported."""
    config.addinivalue_line("markers", "gpu: needs a GPU; run by `pytest -m gpu` alone")
    if config.option.markexpr != "gpu":
        hide_gpus()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where none is to be seen."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m gpu, on a machine with one"))


@pytest.fixture
def tiny_llama() -> LlamaFactory:
    """Builds a random Llama of 2 blocks; keyword arguments go to its config. Same weights for the same config."""

    def build(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # transformers starts norms at 1 and biases at 0, where a lost one would not show
                generator = torch.Generator().manual_seed(sum(name.encode()))
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter.data *= 4
        return model.to(dtype).eval()

    return build
