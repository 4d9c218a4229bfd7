"""How much is drawn, and from which seed."""

from collections.abc import Iterator
from random import Random

import pytest

SEED, SHORT, LONG = 15, 150, 5000


@pytest.fixture
def draws(pytestconfig: pytest.Config) -> Iterator[Random]:
    """A generator for each case; the seed of the case is all that is needed to see it again."""
    return iter([Random(SEED * 10**6 + case) for case in range(LONG if pytestconfig.getoption("soak") else SHORT)])
