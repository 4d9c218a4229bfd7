"""Whether the optional kernels can run here."""

import torch

from malora_dist.errors import ConfigError
from malora_dist.ops.triton_ready import missing_for_triton


def require_triton(device: torch.device, name: str = "computation") -> None:
    """Raise ConfigError where the Triton kernels cannot run on `device`, with what is missing.

    `name`: what people who asked for them call the argument or setting.
    """
    missing = missing_for_triton(device)
    if missing is not None:
        raise ConfigError(f"{name}=grouped_triton needs {missing}; choose {name}=auto")
