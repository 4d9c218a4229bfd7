"""LLaMA-2 7B on the recipe that ships with the package, and real runs of small models, once for all tests."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import malora_dist.recipes
from malora_dist.config import AdapterConfig, RunConfig, load_config
from malora_dist.plan.run import Run, run_of
from malora_dist.plan.shapes import ModelShape, find_shape
from malora_dist.summary import adapter_spec
from tests.plan.workers import measure, planned

RECIPES = Path(malora_dist.recipes.__file__).parent


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


@dataclass
class RealRuns:
    """What every rank of `world_size` processes measured, and the plans of the same cases."""

    folder: str
    world_size: int

    def __post_init__(self) -> None:
        self.ranks = measure(self.folder, self.world_size)

    def plan(self, name: str) -> Run:
        return planned(self.folder, name, self.world_size)


@pytest.fixture(scope="session")
def runs_of_2(tmp_path_factory: pytest.TempPathFactory) -> RealRuns:
    return RealRuns(str(tmp_path_factory.mktemp("two")), 2)


@pytest.fixture(scope="session")
def runs_of_4(tmp_path_factory: pytest.TempPathFactory) -> RealRuns:
    return RealRuns(str(tmp_path_factory.mktemp("four")), 4)


@pytest.fixture
def real_runs(request: pytest.FixtureRequest) -> RealRuns:
    """The runs of the number of processes that the test is parametrised with."""
    runs: RealRuns = request.getfixturevalue(f"runs_of_{request.param}")
    return runs
