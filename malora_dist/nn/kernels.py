"""Whether the optional kernels can run here."""

import importlib.util

import torch

from malora_dist.errors import ConfigError
from malora_dist.functional.grouped_triton import triton_available


def require_triton(device: torch.device) -> None:
    """Raises ConfigError where the Triton kernels cannot run on `device`, with what to do."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError('the Triton kernels need triton, which is not installed: pip install "malora_dist[kernels]"')
    if not triton_available(device):
        raise ConfigError(f"the Triton kernels need a CUDA device, not {device.type!r}: choose another computation")
