import json
import logging
import math
from pathlib import Path

import pytest

from malora_dist.errors import MaloraError
from malora_dist.tracking.metrics import MetricsWriter, Record, cut_records, read_metrics, without_lost_steps

RECORDS = [
    {"kind": "train", "step": 1, "loss": 2.5, "train/boolq/loss": 1 / 3},
    {"kind": "routing", "step": 1, "tasks": ["nan", "boolq"], "share": {"nan": {"l": [0.25, 0.75]}}},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for record in RECORDS:
            writer.write(record)
    return path


def test_records_come_back_exactly(path: Path) -> None:
    assert read_metrics(path) == RECORDS


def test_a_record_is_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write(RECORDS[0])
    assert read_metrics(tmp_path / "m.jsonl") == RECORDS[:1]
    writer.close()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"kind": "train", "loss": math.nan, "grad_norm": -math.inf, "share": {"t": [math.inf, 1.0]}})

    def refuse(name: str) -> None:
        pytest.fail(f"{name} in the file")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"kind": "train", "loss": "nan", "grad_norm": "-inf", "share": {"t": ["inf", 1.0]}}
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"]) and record["grad_norm"] == -math.inf and record["share"]["t"][0] == math.inf


def test_a_half_written_last_line_is_left_out_and_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = path.read_bytes()
    for cut in range(1, len(whole) - whole[:-1].rfind(b"\n") - 2):
        path.write_bytes(whole[: -1 - cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_metrics(path) == RECORDS[:1]
        assert "half written" in caplog.text and str(path) in caplog.text


def test_a_last_line_that_lacks_only_its_newline_counts(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    assert read_metrics(path) == RECORDS and caplog.text == ""


@pytest.mark.parametrize(
    "damage",
    [
        b'{"kind": "tr',
        b"",
        b"[1, 2]",
        b'{"step": 1}',
        b'{"kind": "train", "loss": NaN}',
        b'{"kind": "\xff"}',
        b'{"kind": ["train"]}',
        b'{"kind": "train", "step": "1"}',
        b'{"kind": "train", "step": true}',
        b'{"kind": "resume"}',
        b'{"kind": ' + b"[" * 99_999,
    ],
    ids=[
        "half",
        "empty",
        "list",
        "no kind",
        "bare NaN",
        "not UTF-8",
        "kind no text",
        "step no number",
        "step no count",
        "resumed nowhere",
        "nested",
    ],
)
def test_damage_elsewhere_names_the_line(path: Path, damage: bytes) -> None:
    first, second, end = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, damage, second, end]))
    with pytest.raises(MaloraError, match=r"metrics\.jsonl:2: damaged"):
        read_metrics(path)
    path.write_bytes(b"\n".join([first, damage, b""]))
    with pytest.raises(MaloraError, match=r"metrics\.jsonl:2: damaged"):
        read_metrics(path)


def test_writing_goes_on_after_a_crash(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"kind": "trai')
    with MetricsWriter(path) as writer:
        writer.write(RECORDS[0])
    assert read_metrics(path) == [*RECORDS, RECORDS[0]]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MaloraError, match="none.jsonl cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_a_record_without_a_kind_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="kind"):
        writer.write({"loss": 1.0})
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_steps_that_were_lost_and_done_again_are_left_out() -> None:
    def record(kind: str, step: int, **more: float) -> Record:
        return {"kind": kind, "step": step, **more}

    facts: Record = {"kind": "run", "world_size": 2}
    lost = [record("train", 5), record("eval", 6), record("routing", 6), record("train", 7)]
    records = [
        facts,
        record("train", 3),
        record("eval", 4),
        *lost,
        facts,
        record("resume", 4),
        record("train", 5, loss=2),
    ]
    once = without_lost_steps(records)
    assert once == [
        facts, record("train", 3), record("eval", 4), facts, record("resume", 4), record("train", 5, loss=2),
    ]  # fmt: skip
    # Again, from before the first resume.
    twice = without_lost_steps([*records, record("resume", 3), record("eval", 4, loss=1)])
    assert twice == [facts, record("train", 3), facts, record("resume", 3), record("eval", 4, loss=1)]
    assert without_lost_steps(records[:4]) == records[:4]
    # The validation of the step that was resumed from is done a second time, and a third.
    again = [record("eval", 5), record("resume", 5), record("eval", 5, loss=3)]
    assert without_lost_steps([*records, *again]) == [*once, record("resume", 5), record("eval", 5, loss=3)]


def records_of(steps: range) -> list[Record]:
    kinds = ("train", "eval", "routing", "checkpoint")
    return [{"kind": kind, "step": step} for step in steps for kind in kinds]


@pytest.mark.parametrize("lines", range(1, 13))
def test_what_goes_on_leaves_each_record_once_wherever_it_was_killed(path: Path, lines: int) -> None:
    """Killed after any line, it goes on from step 2; its validation is done again unless its checkpoint holds it."""
    whole = [{"kind": "run"}, *records_of(range(1, 4))]
    for validated in (True, False):
        path.unlink()
        with MetricsWriter(path) as writer:
            for record in [*records_of(range(1, 3)), *whole[9:]][: max(8 if validated else 5, lines)]:
                writer.write(record)
            writer.cut(2, () if validated else ("eval", "routing"))
            for record in [*records_of(range(2, 3))[1:3]] if not validated else []:
                writer.write(record)
            if not writer.holds("checkpoint", 2):
                writer.write({"kind": "checkpoint", "step": 2})
            for record in whole[9:]:
                writer.write(record)
        found = sorted((record["step"], record["kind"]) for record in read_metrics(path))
        assert found == sorted((record["step"], record["kind"]) for record in whole[1:])


def test_the_cut_keeps_facts_and_every_damaged_line(path: Path) -> None:
    damaged = b"\xff damaged\n"
    facts: Record = {"kind": "run", "world_size": 2}
    lines = [facts, *RECORDS, {"kind": "train", "step": 2}, {"kind": "resume", "step": 1}]
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + damaged)
    before = path.read_bytes()
    cut_records(path, 1)
    # An earlier version left step 2, lost before it went on from step 1, in the file.
    assert path.read_bytes() == before.replace(b'{"kind": "train", "step": 2}\n', b"")
    cut_records(path, 0)
    assert [json.loads(line) for line in path.read_bytes().splitlines()[:-1]] == [facts]
    assert path.read_bytes().endswith(damaged) and [file.name for file in path.parent.iterdir()] == [path.name]
