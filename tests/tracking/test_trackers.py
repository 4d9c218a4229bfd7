import sys
from importlib import import_module
from pathlib import Path

import pytest

from malora_dist.errors import MaloraError
from malora_dist.tracking import trackers
from malora_dist.tracking.trackers import open_trackers, scalars

TRAIN = {"kind": "train", "step": 7, "loss": 2.5, "learning_rate": 1e-3, "train/boolq/loss": 1.5}
ROUTING = {
    "kind": "routing",
    "step": 7,
    "tasks": ["boolq"],
    "share": {"boolq": {"layers.0.q_proj": [0.25, 0.75], "layers.1.q_proj": [0.75, 0.25]}},
}


def test_names_of_scalars() -> None:
    assert scalars(TRAIN) == {"train/loss": 2.5, "train/learning_rate": 1e-3, "train/boolq/loss": 1.5}
    assert scalars({"kind": "eval", "step": 7, "eval/boolq/accuracy": 0.5}) == {"eval/boolq/accuracy": 0.5}
    assert scalars(ROUTING) == {"routing/boolq/expert_0": 0.5, "routing/boolq/expert_1": 0.5}
    assert scalars({"kind": "run", "world_size": 2}) == {}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_says_what_to_install(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.utils.tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MaloraError, match=rf"train.report_to={name} .*pip install 'malora_dist\[trackers\]'"):
        open_trackers([name], tmp_path, {})
    assert open_trackers([], tmp_path, {}) == []


def test_an_unknown_tracker_is_named(tmp_path: Path) -> None:
    with pytest.raises(MaloraError, match="train.report_to='mlflow' must be one of tensorboard, wandb"):
        open_trackers(["mlflow"], tmp_path, {})


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    import_module("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(["tensorboard"], tmp_path, {"adapter": {"r": 12}})
    for record in ({"kind": "run", "world_size": 2}, TRAIN, ROUTING):
        tracker.log(record)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(scalars(TRAIN)) | set(scalars(ROUTING))
    (loss,) = events.Scalars("train/boolq/loss")
    assert (loss.step, loss.value) == (7, 1.5)


def test_tensorboard_writes_a_record_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flush is a write to what may be a network's file system."""
    written: list[str] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            pass

        def add_text(self, *_: object) -> None:
            pass

        def add_scalar(self, name: str, *_: object) -> None:
            written.append(name)

        def flush(self) -> None:
            written.append("flush")

        close = flush

    monkeypatch.setattr(trackers, "_summary_writer", lambda: Writer)
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
    for record in ({"kind": "run", "world_size": 2}, TRAIN, ROUTING):
        tracker.log(record)
    assert written == [*scalars(TRAIN), "flush", *scalars(ROUTING), "flush"]


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path: Path) -> None:
    import_module("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (None, 5):
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
        if start is not None:
            tracker.log({"kind": "resume", "step": start, "checkpoint": "step-000005"})
        for step in range((start or 3) + 1, 8):
            tracker.log({"kind": "train", "step": step, "loss": 10.0 * (start or 0) + step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(4, 4.0), (5, 5.0), (6, 56.0), (7, 57.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


class Broken:
    """A tracker whose service is down, from the call of this number on."""

    def __init__(self, works: int) -> None:
        self.works, self.calls = works, ["open"]
        self._call("open")

    def _call(self, name: str) -> None:
        self.works -= 1
        if self.works < 0:
            raise ConnectionError(f"{name}: no route to host")

    def log(self, record: object) -> None:
        self.calls.append("log")
        self._call("log")

    def close(self, *, failed: bool = False) -> None:
        self.calls.append(f"close {failed}")
        self._call("close")


@pytest.mark.parametrize("works", range(5))
def test_a_tracker_that_fails_is_dropped_with_one_warning(
    works: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At its start, at the first or second record, or at its end; the other tracker of the run has every record."""
    made: list[Broken] = []

    def make(works: int) -> Broken:
        made.append(Broken(works))
        return made[-1]

    table = {"wandb": lambda *_: make(works), "tensorboard": lambda *_: make(100)}
    monkeypatch.setattr(trackers, "_TRACKERS", table)
    opened = open_trackers(["wandb", "tensorboard"], tmp_path, {})
    for tracker in opened:
        tracker.log(TRAIN)
        tracker.log(TRAIN)
        tracker.close()
        tracker.close()
    assert made[-1].calls == ["open", "log", "log", "close False"]
    wanted = [[], ["open", "log", "close True"], ["open", "log", "log", "close True"], made[-1].calls, made[-1].calls]
    assert [one.calls for one in made[:-1]] == ([wanted[works]] if works else [])
    assert caplog.text.count("train.report_to=wandb failed") == int(works < 4) == caplog.text.count("no route")


@pytest.mark.parametrize("left", [None, "", "\n"])
def test_a_wandb_run_has_one_id_for_all_its_starts(
    left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a process that was killed while it wrote the id."""
    ids: list[str] = []

    class Wandb:
        def init(self, **settings: str) -> None:
            ids.append(settings["id"])

    monkeypatch.setattr(trackers, "_wandb", Wandb)
    if left is not None:
        (tmp_path / "wandb-id").write_text(left)
    for _ in range(2):
        open_trackers(["wandb"], tmp_path, {})
    assert ids == [(tmp_path / "wandb-id").read_text()] * 2 and len(ids[0]) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["wandb-id"]


@pytest.mark.e2e
def test_wandb_takes_the_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_module("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tracker,) = open_trackers(["wandb"], tmp_path, {"adapter": {"r": 12}})
    for record in (TRAIN, {"kind": "eval", "step": 7, "eval/boolq/accuracy": 0.5}, ROUTING):
        tracker.log(record)
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
