"""The same global batches on any number of ranks, across epochs and restarts; and the row a micro-batch is."""

from collections import Counter

import numpy as np
import pytest
import torch

from malora_dist.data.encode import Sample
from malora_dist.data.loader import MicroBatch, TrainLoader, collate
from malora_dist.data.mixture import mixture_shares
from malora_dist.errors import CheckpointError, DataError, TopologyError

SIZES = (23, 7, 11)


def make_samples(sizes: tuple[int, ...] = SIZES) -> list[Sample]:
    rng = np.random.default_rng(0)
    tasks = np.repeat(np.arange(len(sizes)), sizes)
    lengths = rng.integers(2, 9, len(tasks))
    return [
        Sample(i, int(task), rng.integers(3, 99, length).astype(np.int32), int(rng.integers(1, length)))
        for i, (task, length) in enumerate(zip(tasks, lengths, strict=True))
    ]


def make_loader(rank: int = 0, world_size: int = 1, **options: object) -> TrainLoader:
    settings = {"task_sizes": SIZES, "global_batch_size": 8, "micro_batch_size": 2, "seed": 5, **options}
    return TrainLoader(make_samples(), rank=rank, world_size=world_size, **settings)  # type: ignore[arg-type]


def ids(batches: list[MicroBatch]) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in batches]


def test_collate_by_hand() -> None:
    samples = [Sample(7, 1, np.array([5, 6, 2], np.int32), 1), Sample(4, 0, np.array([2, 9, 8, 2], np.int32), 3)]
    batch = collate(samples)
    expected = {
        "input_ids": [[5, 6, 2, 2, 9, 8, 2]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3]],
        "target_index": [0, 1, 5],
        "targets": [6, 2, 2],
        "target_sample": [0, 0, 1],
        "token_sample": [0, 0, 0, 1, 1, 1, 1],
        "sample_ids": [7, 4],
        "task_ids": [1, 0],
        "target_counts": [2, 1],
    }
    for name, value in expected.items():
        tensor = getattr(batch, name)
        assert tensor.tolist() == value and tensor.dtype == torch.int64, name
    assert batch.cu_seq_lens.tolist() == [0, 3, 7] and batch.cu_seq_lens.dtype == torch.int32
    assert (batch.max_length, batch.tasks_and_targets) == (4, ((1, 2), (0, 1)))
    moved = batch.to("meta")
    assert moved.targets.device.type == "meta" and moved.max_length == 4


def test_targets_follow_from_the_samples_one_by_one() -> None:
    samples = make_samples()
    batch = collate(samples)
    starts = np.cumsum([0] + [len(s.input_ids) for s in samples])
    wanted = [
        (int(starts[i]) + p - 1, int(s.input_ids[p]), i)
        for i, s in enumerate(samples)
        for p in range(s.prompt_length, len(s.input_ids))
    ]
    got = zip(batch.target_index.tolist(), batch.targets.tolist(), batch.target_sample.tolist(), strict=True)
    assert list(got) == wanted


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_global_batches_on_more_ranks(world_size: int) -> None:
    one = make_loader()
    many = [make_loader(rank, world_size) for rank in range(world_size)]
    for _ in range(15):
        whole = [i for row in ids(next(one)) for i in row]
        parts = [ids(next(loader)) for loader in many]
        assert len(parts[0]) == 8 // (2 * world_size)
        # micro-batch a of rank r is the (a * world_size + r)-th pair of the global batch
        together = [i for a in range(len(parts[0])) for r in range(world_size) for i in parts[r][a]]
        assert together == whole


def test_epochs_follow_each_other_without_dropping_a_sample() -> None:
    loader = make_loader()
    stream = [i for _ in range(41) for row in ids(next(loader)) for i in row]
    assert len(stream) == 8 * 41
    for epoch in range(8):
        assert sorted(stream[epoch * 41 : (epoch + 1) * 41]) == list(range(41))
    assert stream[:41] != stream[41:82]
    assert loader.epoch == 8


def test_a_global_batch_may_be_larger_than_an_epoch() -> None:
    loader = make_loader(global_batch_size=100)
    assert max(Counter(i for row in ids(next(loader)) for i in row).values()) == 3


def test_steps() -> None:
    loader = make_loader()
    assert loader.steps_per_epoch == 41 / 8
    assert (loader.steps_for(1), loader.steps_for(8), loader.steps_for(0.01)) == (6, 41, 1)


def test_restart_goes_on_where_it_stopped_on_another_number_of_ranks() -> None:
    loader = make_loader()
    for _ in range(7):
        next(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (1, 15)
    assert make_loader(1, 2).load_state_dict(state).state_dict() == state
    resumed = [make_loader(rank, 2).load_state_dict(state) for rank in range(2)]
    for _ in range(10):
        whole = [i for row in ids(next(loader)) for i in row]
        parts = [ids(next(r)) for r in resumed]
        assert [i for a in range(2) for r in range(2) for i in parts[r][a]] == whole


def test_state_of_other_data_is_refused() -> None:
    state = make_loader().state_dict()
    changed = make_samples()
    changed[3].input_ids[0] += 1
    other = TrainLoader(changed, task_sizes=SIZES, global_batch_size=8, micro_batch_size=2, seed=5)
    with pytest.raises(CheckpointError, match="fingerprint"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed"):
        make_loader(seed=6).load_state_dict(state)
    with pytest.raises(CheckpointError, match="shares"):
        make_loader(shares=mixture_shares(SIZES, "uniform")).load_state_dict(state)


def old_state(epoch: int, position: int, **options: object) -> dict[str, object]:
    """A state of a version that did not carry remainders from an epoch to the next."""
    state = make_loader(**options).state_dict() | {"epoch": epoch, "position": position}
    return {name: value for name, value in state.items() if name != "order"}


def test_a_state_of_an_older_version_goes_on_or_is_refused() -> None:
    uniform = {"shares": mixture_shares(SIZES, "uniform")}
    for options, epoch, position in (({}, 7, 3), (uniform, 0, 40), (uniform, 1, 0)):
        resumed = make_loader(**options).load_state_dict(old_state(epoch, position, **options))
        fresh = make_loader(**options)
        while fresh.state_dict()["epoch"] < epoch or fresh.state_dict()["position"] < position:
            fresh._consumed += 1
        assert ids(next(resumed)) == ids(next(fresh))
    for state in (old_state(1, 1, **uniform), old_state(0, 0) | {"order": 3}):
        with pytest.raises(CheckpointError, match="another version of malora_dist, which draws the samples of epochs"):
            make_loader(**(uniform if "order" not in state else {})).load_state_dict(state)


def test_samples_drawn_by_task() -> None:
    loader = make_loader(shares=mixture_shares(SIZES, "uniform"))
    tasks = np.repeat(np.arange(3), SIZES)
    counts = np.zeros(3, dtype=int)
    for steps in range(14):
        assert loader.drawn(steps) == tuple(counts)
        counts += np.bincount(tasks[loader.global_batch(8 * steps)], minlength=3)


def test_tasks_of_which_no_sample_is_drawn_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the run is: a smoke test's rows with max_steps a billion and max_hours are many epochs."""
    for shares in (mixture_shares(SIZES), (0.99, 0.0099, 0.0001), (1 - 2e-9, 1e-9, 1e-9)):
        loader = make_loader(shares=shares)
        for steps in (*range(30), 200, 3000, 12000):
            assert loader.unseen(steps) == [task for task, count in enumerate(loader.drawn(steps)) if not count]
    monkeypatch.setattr(TrainLoader, "drawn", lambda *_: pytest.fail("counted through"))
    for shares in (mixture_shares(SIZES), (1 - 2e-9, 1e-9, 1e-9)):
        assert make_loader(shares=shares).unseen(10**12) == make_loader(shares=shares).unseen(10**6) == []


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(TopologyError, match="global_batch_size=8 must be a multiple of .*=2 times 3 processes"):
        make_loader(world_size=3)
    with pytest.raises(TopologyError, match="rank=2"):
        make_loader(rank=2, world_size=2)
    with pytest.raises(DataError, match="do not add up to the 41 samples"):
        make_loader(task_sizes=(1, 2, 3))
