"""Every generator goes on as it would have, after a way through files."""

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from malora_dist.training.random_state import random_state, set_random_state


def draw() -> list[float]:
    # The odd number of normals leaves one kept inside a generator.
    numbers = [random.random(), random.gauss(0, 1), float(torch.randn(())), float(torch.rand(()))]
    return [*numbers, *np.random.standard_normal(3).tolist(), float(np.random.random())]


def test_generators_go_on(tmp_path: Path) -> None:
    draw()
    save_file(random_state(), tmp_path / "rng.safetensors")
    wanted = [draw() for _ in range(3)]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert draw() != wanted[0]
    set_random_state(load_file(tmp_path / "rng.safetensors"))
    assert [draw() for _ in range(3)] == wanted


def test_what_is_not_in_the_state_is_left_alone() -> None:
    random.seed(3)
    first = random.getstate()
    torch.manual_seed(7)
    kept = torch.get_rng_state()
    torch.rand(3)
    set_random_state({"torch": kept})
    assert random.getstate() == first and torch.equal(torch.get_rng_state(), kept)
