"""Which run goes on, which is refused, and what is said about it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from malora_dist.checkpoint.layout import Manifest
from malora_dist.checkpoint.store import CheckpointStore
from malora_dist.config import RunConfig, config_from_dict, config_text, plain_config
from malora_dist.distributed.process_groups import World
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files.exit_status import (
    FAILED,
    FINISHED,
    PREEMPTED,
    clear_exit_status,
    read_exit_status,
    write_exit_status,
)
from malora_dist.ops.nf4 import QUANTIZER
from malora_dist.training.base_model import base_quantizer
from malora_dist.training.resume import ResumePoint, check_base, check_data, find_resume_point, open_checkpoint
from tests.checkpoint.samples import manifest_of, tensors_of, write_files
from tests.config.recipes import recipe
from tests.multiprocess import run_distributed


def config(run: Path, **train: Any) -> RunConfig:
    return config_from_dict({**recipe(train=train), "output_dir": str(run)})


def begun(
    run: Path, steps: tuple[int, ...] = (), outcome: str | None = None, quantizer: str | None = QUANTIZER, **train: Any
) -> RunConfig:
    """A run folder as a run leaves it: its config, checkpoints of these steps, and exit.json."""
    run.mkdir()
    its_config = config(run, **train)
    (run / "config.yaml").write_text(config_text(its_config))
    store = CheckpointStore(run / "checkpoints")
    for step in steps:
        files, places = write_files(store.begin(step), tensors_of(step), 1)
        manifest = replace(manifest_of(step, files, places), config=plain_config(its_config))
        manifest.state.update({} if quantizer is None else {"quantizer": quantizer})
        store.commit(step, manifest)
    if outcome is not None:
        step = steps[-1] if steps else 0
        write_exit_status(run, outcome, 75, reason="SIGUSR1", step=step, checkpoint=f"step-{step:06d}")
    return its_config


def test_without_a_run_a_new_one_starts(tmp_path: Path) -> None:
    assert find_resume_point(config(tmp_path / "run")) == ResumePoint()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("not a run")
    assert find_resume_point(config(tmp_path / "other")) == ResumePoint()


@pytest.mark.parametrize("outcome", [None, PREEMPTED, FAILED])
def test_an_unfinished_run_goes_on_from_its_newest_checkpoint(outcome: str | None, tmp_path: Path) -> None:
    run = tmp_path / "run"
    its_config = begun(run, (5, 10), outcome)
    # `latest` is for people: a kill may have left it behind.
    (run / "checkpoints" / "latest").write_text("step-000005\n")
    assert find_resume_point(its_config) == ResumePoint(str(run), str(run / "checkpoints" / "step-000010"), ())


def test_a_run_that_has_saved_nothing_starts_again_in_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    point = find_resume_point(begun(run, (), PREEMPTED))
    assert (point.folder, point.checkpoint) == (str(run), None) and "no checkpoint yet" in point.notes[0]


def test_a_start_that_failed_does_not_use_up_the_run(tmp_path: Path) -> None:
    """Without a checkpoint the corrected recipe starts again there, whatever it changes."""
    run = tmp_path / "run"
    begun(run, (), FAILED)
    point = find_resume_point(config(run, learning_rate=0.1, save_steps=5))
    assert (point.folder, point.checkpoint) == (str(run), None)
    changed = ["train.learning_rate: 0.0005 -> 0.1", "train.save_steps: None -> 5"]
    assert [note for note in point.notes if "changed" in note] == [f"changed since: {text}" for text in changed]
    # Also from elsewhere, and where what the failed start left cannot be read.
    begun(tmp_path / "other", (3,))
    elsewhere = find_resume_point(config(run, resume_from_checkpoint=str(tmp_path / "other")))
    assert (elsewhere.folder, str(elsewhere.checkpoint)[-11:]) == (str(run), "step-000003")
    (run / "config.yaml").write_text("train: {lr: [")
    assert find_resume_point(config(run)).folder == str(run)


def test_a_finished_run_is_an_error_with_ways_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    its_config = begun(run, (10,), FINISHED)
    with pytest.raises(
        ConfigError, match="is finished. --new-run starts another.*=.*step-000010 and another output_dir"
    ):
        find_resume_point(its_config)
    assert find_resume_point(config(run, resume_from_checkpoint=None)) == ResumePoint()
    # A run of a version without checkpoints left its adapter and no more.
    begun(tmp_path / "old")
    (tmp_path / "old" / "adapter").mkdir()
    with pytest.raises(ConfigError, match="is finished"):
        find_resume_point(config(tmp_path / "old"))
    # Killed between its adapter and its only checkpoint.
    (tmp_path / "old" / "measured_on.json").write_text("{}")
    assert find_resume_point(config(tmp_path / "old")).folder == str(tmp_path / "old")


def test_another_recipe_is_refused_and_harmless_changes_are_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begun(run, (10,))
    with pytest.raises(ConfigError) as error:
        find_resume_point(config(run, learning_rate=0.1, seed=3, save_steps=5))
    for said in (f"output_dir={run}", "train.learning_rate: 0.0005 -> 0.1", "train.seed: 42 -> 3", "--new-run"):
        assert said in str(error.value)
    assert "save_steps" not in str(error.value)
    notes = find_resume_point(config(run, save_steps=5, per_device_train_batch_size=2)).notes
    assert notes == (
        "changed since: train.per_device_train_batch_size: 4 -> 2 (same numbers to rounding)",
        "changed since: train.save_steps: None -> 5",
    )


def test_a_base_quantised_otherwise_is_refused_and_one_of_an_older_version_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="step-000010 was trained on a base quantised by another, this .* by nf4-"
    ):
        find_resume_point(begun(tmp_path / "another", (10,), quantizer="another"))
    older = begun(tmp_path / "older", (10,), quantizer=None)
    assert find_resume_point(older).notes == (
        f"step-000010 does not tell how its 4-bit base was quantised: here by {QUANTIZER}, a few codes may differ",
    )
    plain = config_from_dict({**recipe(model={"load_in_4bit": False}), "output_dir": "run"})
    assert (base_quantizer(older), base_quantizer(plain)) == (QUANTIZER, None)


def test_a_path_is_a_new_run_from_there(tmp_path: Path) -> None:
    run, new = tmp_path / "run", tmp_path / "new"
    begun(run, (5, 10), FINISHED)
    for path, step in ((run, 10), (run / "checkpoints" / "step-000005", 5)):
        point = find_resume_point(config(new, resume_from_checkpoint=str(path)))
        assert (point.folder, point.checkpoint) == (None, str(run / "checkpoints" / f"step-{step:06d}"))
    with pytest.raises(ConfigError, match="train.resume_from_checkpoint=.*another recipe"):
        find_resume_point(config(new, resume_from_checkpoint=str(run), seed=1))
    # The same command again, in a requeued job, goes on with the run that it began.
    begun(new, (), PREEMPTED, resume_from_checkpoint=str(run))
    assert "no checkpoint yet" in find_resume_point(config(new, resume_from_checkpoint=str(run))).notes[-1]
    with pytest.raises(ConfigError, match=f"output_dir={run} holds a run already; give another output_dir"):
        find_resume_point(config(run, resume_from_checkpoint=str(run)))
    point = find_resume_point(config(new, resume_from_checkpoint=str(run)))
    assert (point.folder, point.checkpoint) == (str(new), str(run / "checkpoints" / "step-000010"))
    assert find_resume_point(config(new, resume_from_checkpoint=str(run / "checkpoints" / "latest"))) == point
    begun(tmp_path / "later", (11,), PREEMPTED, resume_from_checkpoint=str(run))
    point = find_resume_point(config(tmp_path / "later", resume_from_checkpoint=str(run)))
    assert point.checkpoint == str(tmp_path / "later" / "checkpoints" / "step-000011")
    begun(tmp_path / "empty")
    (tmp_path / "empty" / "checkpoints").mkdir()
    for path, said in ((tmp_path / "empty", "holds no checkpoint"), (tmp_path / "no", "is not a checkpoint")):
        with pytest.raises(CheckpointError, match=f"train.resume_from_checkpoint={path}: .*{said}"):
            find_resume_point(config(tmp_path / "newer", resume_from_checkpoint=str(path)))


def test_the_outcome_is_read_back_or_refused(tmp_path: Path) -> None:
    assert read_exit_status(tmp_path) is None
    write_exit_status(tmp_path, PREEMPTED, 75, reason="SIGTERM", step=7, checkpoint=None)
    found = read_exit_status(tmp_path)
    assert found is not None and {**found, "time": ""} == {
        "outcome": "preempted", "exit_code": 75, "reason": "SIGTERM", "step": 7, "checkpoint": None, "time": "",
    }  # fmt: skip
    (tmp_path / "exit.json").write_text('{"outcome": "fin')
    with pytest.raises(CheckpointError, match="exit.json is damaged"):
        read_exit_status(tmp_path)
    clear_exit_status(tmp_path)
    assert read_exit_status(tmp_path) is None


def test_another_base_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "run", (3,))
    manifest = Manifest.read(tmp_path / "run" / "checkpoints" / "step-000003")
    check_base(manifest, manifest.base)
    # Wherever it lies: only its content counts.
    check_base(manifest, {**manifest.base, "name": "elsewhere", "revision": "main"})
    with pytest.raises(CheckpointError, match="trained on the base some/base with fingerprint='f00d'.*x has.*'beef'"):
        check_base(manifest, {**manifest.base, "name": "x", "fingerprint": "beef"})
    with pytest.raises(CheckpointError, match="dtype='bfloat16'.*'float32' here. Set model.dtype"):
        check_base(manifest, {**manifest.base, "dtype": "float32"})


def test_other_rows_of_a_task_are_refused(tmp_path: Path) -> None:
    begun(tmp_path / "run", (3,))
    manifest = Manifest.read(tmp_path / "run" / "checkpoints" / "step-000003")
    digests = {"train": {"a": "1", "b": "2"}, "test": {"a": "3", "b": "4"}}
    manifest = replace(manifest, state={"data": digests})
    check_data(manifest, digests)
    wrong = [
        (
            {**digests, "train": {"a": "1", "b": "x"}},
            "data.tasks: the train rows of task 'b' are not those of step-000003",
        ),
        ({**digests, "test": {"a": "3"}}, "the test rows of task 'b'"),
        ({**digests, "train": {"a": "1", "c": "2"}}, "the train rows of task 'b'"),
    ]
    for data, said in wrong:
        with pytest.raises(CheckpointError, match=said):
            check_data(manifest, data)


def open_on_all(world: World, folder: str) -> str:
    try:
        open_checkpoint(Path(folder), world)
    except CheckpointError as error:
        return str(error)
    return "whole"


@pytest.mark.distributed
def test_damage_that_one_process_finds_is_an_error_on_all(tmp_path: Path) -> None:
    begun(tmp_path / "run", (3, 4))
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    whole, damaged = (str(folder.with_name(f"step-{step:06d}")) for step in (3, 4))
    path = folder / "optimizer-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    results = run_distributed("tests.training.test_resume:open_both", 3, folders=[whole, damaged])
    assert [first for first, _ in results] == ["whole"] * 3
    said = {second for _, second in results}
    assert len(said) == 1 and f"{path} is damaged: its SHA-256 is" in said.pop()


def open_both(world: World, folders: list[str]) -> list[str]:
    return [open_on_all(world, folder) for folder in folders]
