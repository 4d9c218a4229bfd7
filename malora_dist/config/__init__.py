"""What a run is: the recipe, its checks, and DeepSpeed's configuration made from it. Importable without torch."""

from malora_dist.config.load import config_from_dict, config_text, load_config, plain_config
from malora_dist.config.overrides import NEW_RUN, split_arguments
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
    "NEW_RUN",
    "AdapterConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "config_from_dict",
    "config_text",
    "load_config",
    "plain_config",
    "split_arguments",
]
