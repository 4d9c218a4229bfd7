"""What ZeRO-3 keeps whole, against real runs whose model is larger than stage3_max_live_parameters."""

import pytest

from malora_dist.plan.gathers import gathered_bytes, live_share
from tests.plan.conftest import RealRuns

SHORT = ["zero3-short", "zero3-short-recompute"]


@pytest.mark.parametrize("name", SHORT)
def test_whole_tensors_beside_the_parts(runs_of_2: RealRuns, name: str) -> None:
    run = runs_of_2.plan(name)
    assert 0.2 < live_share(run) < 0.3
    for rank in runs_of_2.ranks:
        assert gathered_bytes(run) == pytest.approx(rank[name]["whole"], rel=0.25)


def test_a_small_model_is_whole_at_its_last_layer(runs_of_2: RealRuns) -> None:
    run = runs_of_2.plan("zero3")
    assert live_share(run) == 1.0
    assert gathered_bytes(run) == pytest.approx(runs_of_2.ranks[0]["zero3"]["whole"], rel=0.1)
