"""ZeRO-3 on two real processes: parts of the right size, the right bits back, and what is misplaced is refused."""

import pytest

from tests.parallel.loading_workers import SHAPES
from tests.parallel.loading_workers import results as loading_results
from tests.parallel.workers import DTYPES, results


def test_each_process_keeps_half_of_every_parameter_and_gets_back_the_main_processes_bits() -> None:
    for rank in results():
        wanted = {"held": 0, "part": 39, "of": 77, "same_as_main": True, "after": 0}
        assert rank["partitioned"] == [wanted] * len(DTYPES)


def test_adapters_come_out_whole_as_they_were_put_in() -> None:
    for rank in results():
        assert rank["adapters"] == {"partitioned": True, "names": True, "same": True}


def test_parameters_on_the_wrong_group_or_stage_are_refused() -> None:
    for number, rank in enumerate(results()):
        refusals = rank["refusals"]
        assert refusals["whole at 2"] == refusals["parts at 3"] == ""
        assert refusals["whole at 3"] == "weight is not partitioned at parallel.zero_stage=3"
        assert refusals["parts at 2"] == "weight is partitioned at parallel.zero_stage=2"
        assert refusals["sub-group"] == (
            f"model.layers.1.mlp.up_proj.P is partitioned over ranks [{number}], it belongs on [0, 1]"
        )


def test_a_process_that_does_not_read_never_holds_the_base_model() -> None:
    """It keeps 18 MB of a model of 125 MB in bfloat16 and 35 MB in 4 bits, and on the way never much more."""
    memory = results()[1]["memory"]
    assert 0.5 * memory["whole"] < memory["part"] < 0.6 * memory["whole"]
    assert memory["part"] < memory["growth"] + 4 * 2**20
    assert memory["growth"] < memory["part"] + 0.4 * memory["whole"], memory


def test_the_process_that_reads_holds_one_full_layer_at_a_time() -> None:
    """It ends with the same 18 MB; on the way come single bfloat16 weights, never the 125 MB of them all."""
    memory = results()[0]["memory"]
    assert memory["growth"] < memory["part"] + 1.5 * memory["whole"], memory


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_part_read_alone_is_the_part_that_deepspeed_cuts(world_size: int) -> None:
    """Same size, padding, place and attributes, also where there are fewer elements than processes."""
    for found in loading_results(world_size):
        assert found["parts"] == [True] * len(SHAPES) * len(DTYPES) * 2, "with and without offload_param"
