"""Who takes part on this machine's device."""

from collections.abc import Sequence

import torch

from malora_dist.adapters.layer import require_triton
from malora_dist.bench.local.peers.baselines import Baseline, chosen
from malora_dist.ops.devices import triton_ready

KERNELS = "grouped_triton"


def taking_part(only: str | None, default: Sequence[str], device: torch.device) -> dict[str, Baseline]:
    """Return the baselines of a list `a,b`, or those of `default` that can run on `device`; Triton's only on a GPU.

    Raises ConfigError for an unknown name, and for one whose kernels cannot run on `device`.
    """
    found = chosen(only, default)
    if only is None:
        kernels = device.type == "cuda" and triton_ready(device)
        return {name: one for name, one in found.items() if kernels or one.computation != KERNELS}
    if any(one.computation == KERNELS for one in found.values()):
        require_triton(device, "adapter.computation")
    return found
