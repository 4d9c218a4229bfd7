"""The state of all random number generators of a process as tensors, which files hold without pickle."""

import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Return the state of all generators.

    Returns:
        `torch` and, with a GPU, `cuda` (uint8); `python` and `numpy` (int64: words, and the bits of a kept normal).
    """
    _, words, normal = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    twister = legacy["state"]
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*words, int(normal is not None), _bits(normal or 0.0)], dtype=torch.int64),
        "numpy": torch.tensor(
            [*twister["key"].tolist(), twister["pos"], legacy["has_gauss"], _bits(legacy["gauss"])], dtype=torch.int64
        ),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` returned; generators that are not in it stay as they are."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "python" in state:
        *words, kept, bits = state["python"].tolist()
        random.setstate((3, tuple(words), _number(bits) if kept else None))
    if "numpy" in state:
        *key, position, kept, bits = state["numpy"].tolist()
        np.random.set_state(("MT19937", np.asarray(key, dtype=np.uint32), position, kept, _number(bits)))


def _bits(number: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _number(bits: int) -> float:
    number: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return number
