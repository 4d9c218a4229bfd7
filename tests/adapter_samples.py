"""Adapter folders whose weights a test changes."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from malora_dist.adapters.io.info import CONFIG, WEIGHTS


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of an adapter folder, as someone does who knows what they do: its config names no checksum."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    config["malora"].pop("weights_sha256", None)
    (folder / CONFIG).write_text(json.dumps(config))
