"""What a run is: the recipe, its checks, and DeepSpeed's configuration made from it. Importable without torch."""

from malora_dist.config.load import config_from_dict, load_config, write_config
from malora_dist.config.overrides import split_arguments
from malora_dist.config.schema import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "config_from_dict",
    "load_config",
    "split_arguments",
    "write_config",
]
