"""The device that refuses what CUDA refuses, for one test."""

from collections.abc import Iterator

import pytest

from malora_dist.bench.strict.backend import register
from malora_dist.bench.strict.device import StrictDevice


@pytest.fixture
def strict() -> Iterator[StrictDevice]:
    register()
    with StrictDevice() as device:
        yield device
