"""Whether the optional kernels can run here."""

import importlib.util

import torch

from malora_dist.errors import ConfigError
from malora_dist.functional.grouped_triton import triton_available

SETTING = "adapter.computation=grouped_triton"


def require_triton(device: torch.device) -> None:
    """Raises ConfigError where the Triton kernels cannot run on `device`, with what to do."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f'{SETTING} needs triton, which is not installed: pip install "malora_dist[kernels]"')
    if not triton_available(device):
        raise ConfigError(f"{SETTING} needs a CUDA device, not {device.type!r}: choose another computation")
