"""Shards are balanced, are what the library writes and reads, and carry the checksum of their bytes."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from malora_dist.checkpoint.shards import file_record, plan_shards, stream_shard, write_shard
from malora_dist.errors import CheckpointError

SIZES = st.dictionaries(st.text("abc", min_size=1), st.integers(0, 1000))


@given(SIZES, st.integers(1, 9), st.integers(1, 3000))
def test_plans(sizes: dict[str, int], world_size: int, shard_bytes: int) -> None:
    plan = plan_shards(sizes, world_size, shard_bytes)
    total = sum(sizes.values())
    assert sorted(name for names in plan for name in names) == sorted(sizes)
    assert all(names == [name for name in sizes if name in names] for names in plan)
    assert len(plan) == max(1, min(-(-total // shard_bytes), world_size, len(sizes)))
    assert len(plan) == 1 or all(plan)
    loads = [sum(sizes[name] for name in names) for names in plan]
    assert max(loads) <= total / len(plan) + max(sizes.values(), default=0)


def test_a_plan_by_hand() -> None:
    sizes = {"a": 10, "b": 60, "c": 30, "d": 40}
    assert plan_shards(sizes, 4, 140) == [["a", "b", "c", "d"]]
    assert plan_shards(sizes, 4, 139) == [["a", "b"], ["c", "d"]]
    assert plan_shards(sizes, 2, 1) == [["a", "b"], ["c", "d"]]
    assert plan_shards(sizes, 9, 1) == [["b"], ["d"], ["c"], ["a"]]
    assert plan_shards({}, 4, 10) == [[]]


def test_the_library_reads_a_shard_and_the_record_is_of_its_bytes(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([-(2**60)]),
        "c": torch.ones(3, 4).t(),
        "d": torch.tensor(2.0),
    }
    path = tmp_path / "x.safetensors"
    record = write_shard(path, tensors)
    content = path.read_bytes()
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert record == file_record(path)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert path.stat().st_mode & 0o777 == 0o640


def test_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sizes: list[int] = []

    def values() -> "object":
        for number in range(3):
            sizes.append(path.stat().st_size)
            yield torch.full((2**16,), float(number))

    stream_shard(path, {name: (torch.float32, (2**16,)) for name in "abc"}, values())  # type: ignore[arg-type]
    assert sizes[1] - sizes[0] >= 2**18 - 2**13 and sizes[2] - sizes[1] == 2**18


def test_long_files_are_hashed_in_pieces(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(content)
    record = file_record(tmp_path / "x")
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'y'} cannot be read: No such file"):
        file_record(tmp_path / "y")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    record = write_shard(path, {"a": torch.ones(3)})
    with pytest.raises(CheckpointError, match=f"{path} cannot be written: File exists"):
        write_shard(path, {"a": torch.zeros(3)})
    assert file_record(path) == record
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'no' / 'x'} cannot be written: No such file"):
        write_shard(tmp_path / "no" / "x", {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path, value: float) -> None:
    bad = torch.ones(4, 5)
    bad[3, 4] = value
    with pytest.raises(CheckpointError, match="x.safetensors: exp_avg.b has 1 of 20 elements that are NaN or infinite"):
        write_shard(tmp_path / "x.safetensors", {"exp_avg.a": torch.ones(3), "exp_avg.b": bad})
