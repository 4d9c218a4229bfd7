"""What a new recipe says of a model that is on this machine."""

import torch

from malora_dist.adapters.targets import all_linear, plain_names
from malora_dist.config import AdapterConfig
from malora_dist.models.load import build_empty_model
from malora_dist.models.resolve import local_model
from malora_dist.ops.target_names import ALL_LINEAR


def family_targets(name_or_path: str) -> tuple[str, ...] | None:
    """The default targets where a model has all of them, else all its linears but the head; None if it is not here.

    Nothing is downloaded, no weight is read. Raises ConfigError for a model that is not supported.
    """
    folder = local_model(name_or_path)
    if folder is None or not (folder / "config.json").is_file():
        return None
    model = build_empty_model(folder, dtype=torch.float32)
    names = all_linear(model)
    default: tuple[str, ...] = AdapterConfig.model_fields["target_modules"].default
    if {name.rpartition(".")[2] for name in names}.issuperset(default):
        return default
    found = plain_names(model, {ALL_LINEAR: names})
    # Whole names would be one line for each layer.
    return found if all("." not in name for name in found) else (ALL_LINEAR,)
