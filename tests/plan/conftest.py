"""LLaMA-2 7B on the recipe that ships with the package."""

from dataclasses import replace

import pytest

from malora_dist.config import AdapterConfig, RunConfig, load_config
from malora_dist.config.summary import adapter_spec
from malora_dist.plan.find_shape import find_shape
from malora_dist.plan.run import Run, run_of
from malora_dist.plan.shapes import ModelShape
from tests.config.recipes import RECIPES


@pytest.fixture
def llama_config() -> RunConfig:
    return load_config(
        RECIPES / "llama2-7b-inter.yaml", ["--adapter.lora_dropout", "0", "--train.per_device_train_batch_size", "2"]
    )


@pytest.fixture
def lora_config(llama_config: RunConfig) -> RunConfig:
    adapter = AdapterConfig(method="lora", r=64, lora_dropout=0.0)
    return llama_config.model_copy(update={"adapter": adapter})


@pytest.fixture
def llama_shape() -> ModelShape:
    return find_shape(str(RECIPES / "models" / "llama2-7b.json"))


@pytest.fixture
def llama_run(llama_config: RunConfig, llama_shape: ModelShape) -> Run:
    """On one process, without recomputation."""
    return replace(run_of(llama_config, adapter_spec(llama_config), llama_shape, 1), checkpointing=False)
