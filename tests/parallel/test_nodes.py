"""Two nodes, as four processes on one machine: one reader each, and nothing sent between them."""

from tests.parallel.loading_workers import NODE_TIMEOUT, results


def test_each_node_keeps_its_own_readers_values() -> None:
    blocks, turns = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]
    for rank, found in enumerate(results(4)):
        assert found["nodes"]["blocks"] == {"ranks": blocks[rank], "own part": True}
        assert found["nodes"]["turns"] == {"ranks": turns[rank], "own part": True}


def test_groups_of_nodes_have_the_runs_timeout() -> None:
    for found in results(4):
        assert found["nodes"]["timeouts"] == [NODE_TIMEOUT, 60], "60 is the test's own"


def test_processes_of_one_machine_are_one_node() -> None:
    assert all(found["nodes"]["alone"] == [0, 1, 2, 3] for found in results(4))


def test_only_one_process_of_a_node_needs_the_files() -> None:
    reads = [found["nodes"]["model"].pop("reads") for found in results(4)]
    assert reads == [True, False, True, False]
    assert all(found["nodes"]["model"] == {"same bits": True} for found in results(4))
