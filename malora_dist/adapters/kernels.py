"""Whether the optional kernels can run here."""

import torch

from malora_dist.errors import ConfigError
from malora_dist.ops.triton_ready import missing_for_triton

SETTING = "adapter.computation=grouped_triton"


def require_triton(device: torch.device) -> None:
    """Raise ConfigError where the Triton kernels cannot run on `device`, with what is missing."""
    missing = missing_for_triton(device)
    if missing is not None:
        raise ConfigError(f"{SETTING} needs {missing}; choose adapter.computation=auto")
