"""Groups of real processes: their timeouts hold, and what is reduced or copied is right."""

from tests.parallel.workers import DTYPES, OTHER_TIMEOUT, TIMEOUT, results


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


def test_values_over_all_processes() -> None:
    for rank in results():
        assert rank["collectives"] == [[3.0, -1.0], [2.0, 0.0], {"rank": 0}, [0, 1, 1, 1]]


def test_replicas_have_the_main_processes_bits_in_every_dtype() -> None:
    for rank in results():
        assert rank["replicated"] == [True] * len(DTYPES)
