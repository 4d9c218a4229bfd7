"""Two real processes: timeouts and collectives of their groups, and parameters in parts of the right size and bits."""

from datetime import timedelta

import pytest
import torch.distributed as dist

from malora_dist.distributed import process_groups
from malora_dist.distributed.process_groups import joining
from malora_dist.errors import TrainingError
from tests.distributed.workers import DTYPES, OTHER_TIMEOUT, TIMEOUT, results

pytestmark = pytest.mark.distributed


def test_every_group_has_the_runs_timeout_once_the_engine_is_built() -> None:
    for rank in results():
        timeouts = rank["timeouts"]
        assert 1800 in timeouts["before"], "a new group no longer ignores the timeout of the first: set_timeouts can go"
        assert len(timeouts["after"]) >= len(timeouts["before"]) >= 2
        assert set(timeouts["after"]) == {OTHER_TIMEOUT}


def test_a_rank_that_never_joins_ends_the_others_within_the_timeout() -> None:
    main = results()[0]["absent"]
    assert "imed out" in main["error"] or "timeout" in main["error"].lower(), main
    assert TIMEOUT - 1 < main["seconds"] < TIMEOUT + 25


def test_processes_that_never_come_are_waited_for_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the variables of a launcher were exported once, for one process."""
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_groups, "PATIENCE_SECONDS", 0)
    place = "RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR=localhost, MASTER_PORT=0"
    with pytest.raises(TrainingError, match=rf"have not come together \({place}\): .*unset them$"), joining():
        dist.TCPStore("localhost", 0, 2, is_master=True, timeout=timedelta(seconds=1))
    assert capsys.readouterr().err == f"waiting for the other processes of this run ({place})\n"


def test_values_over_all_processes() -> None:
    for rank in results():
        assert rank["collectives"] == [[3.0, -1.0], [2.0, 0.0], {"rank": 0}, [0, 1, 1, 1]]


def test_replicas_have_the_main_processes_bits_in_every_dtype() -> None:
    for rank in results():
        assert rank["replicated"] == [True] * len(DTYPES)


def test_each_process_keeps_half_of_every_parameter_and_gets_back_the_main_processes_bits() -> None:
    for rank in results():
        wanted = {"held": 0, "part": 39, "of": 77, "same_as_main": True, "after": 0}
        assert rank["partitioned"] == [wanted] * len(DTYPES)


def test_adapters_come_out_whole_as_they_were_put_in() -> None:
    for number, rank in enumerate(results()):
        # The file of an adapter is written by one process, the only one that holds all of it.
        on_one = True if number == 0 else 0
        assert rank["adapters"] == {"partitioned": True, "names": True, "same": True, "on one": on_one}


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
