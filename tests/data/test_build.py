"""The `data` section as a whole: ids, shares, counts, caching, and the loader on top of it."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from malora_dist.config.data_schema import DataConfig
from malora_dist.data.build import PreparedData, build_data
from malora_dist.data.encode import ChoiceItem, Sample
from malora_dist.data.loader import TrainLoader


@pytest.fixture
def data_section(write_jsonl: Any, tmp_path: Path) -> dict[str, Any]:
    choice = [{"q": f"q{i}", "context": f"c{i}", "choices": ["no", "yes"], "label": "B"} for i in range(40)]
    completion = [{"prompt": f"write {i}", "response": "x" * (i % 30 + 1)} for i in range(100)]
    tasks = [
        {
            "name": "choice",
            "train": write_jsonl("choice.jsonl", choice),
            "test_size": 10,
            "prompt_template": "{context}\n{prompt}\n",
            "fields": {"prompt": "q"},
            "weight": 3,
        },
        {"name": "completion", "train": write_jsonl("completion.jsonl", completion), "validation_size": 0.1},
    ]
    return {"tasks": tasks, "max_seq_length": 40, "mixture": "uniform", "cache_dir": str(tmp_path / "cache")}


def build(section: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    return build_data(DataConfig(**section), tokenizer)


def test_two_tasks(data_section: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    data = build(data_section, tokenizer)
    assert (data.task_names, data.kinds) == (("choice", "completion"), ("multiple_choice", "completion"))
    assert (data.train_sizes, data.shares) == ((30, 90), (0.75, 0.25))
    assert [data.train[i].sample_id for i in range(120)] == list(range(120))
    assert [sample.task_id for sample in data.train[:]] == [0] * 30 + [1] * 90
    assert data.counts["choice"]["samples_per_epoch"] == 90
    first, last = data.evaluation["test"]["choice"][0], data.evaluation["validation"]["completion"][-1]
    assert isinstance(first, ChoiceItem) and isinstance(last, Sample) and last.task_id == 1
    assert tokenizer.decode(first.prompt_ids).startswith("c")
    assert data.evaluation["test"]["completion"] == data.evaluation["validation"]["choice"] == []
    cut = data.counts["completion"]["prompts_cut"]
    assert data.warnings() == [f"task completion: {cut} prompts were truncated on the left to max_seq_length"]


def test_it_says_how_far_it_is(
    data_section: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: 31.0 * next(seconds))
    data = build(data_section, tokenizer)
    said = capsys.readouterr().err
    for line in (
        "choice: reading rows: 2",
        "choice: comparing with held-out rows: 29 of 30",
        "choice: indexing held-out rows: ",
        "completion: tokenising: 0",
    ):
        assert f"task {line}" in said
    assert f"task completion: tokenising: 0 of {data.train_sizes[1]}\n" in said
    build(data_section, tokenizer)
    assert all("reading the bytes of files: " in line for line in capsys.readouterr().err.splitlines())


def test_a_task_that_is_hardly_seen_is_named(data_section: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    choice, completion = data_section["tasks"]
    section = data_section | {"tasks": [{**choice, "weight": 0.001}, completion], "mixture": "proportional"}
    (sentence,) = [text for text in build(section, tokenizer).warnings() if text.startswith("task choice")]
    assert sentence.startswith("task choice: its share of the mixture is 0.04 samples an epoch, one in about 25 epochs")


def test_labels_that_may_count_from_1_are_named(
    data_section: dict[str, Any], tokenizer: PreTrainedTokenizerBase, write_jsonl: Any
) -> None:
    def warned(labels: list[Any], **more: Any) -> list[str]:
        rows = [{"prompt": f"q{i}", "choices": ["no", "yes", "2"], "label": label} for i, label in enumerate(labels)]
        task = {"name": "t", "train": write_jsonl("t.jsonl", rows), **more}
        return build(data_section | {"tasks": [task], "max_seq_length": 99}, tokenizer).warnings()

    (sentence,) = warned([1, "1", 1.0, "B", 1])
    assert sentence.startswith(
        "task t: 4 labels are numbers from 1 on, none is 0, and 1 is taken for the second choice"
    )
    assert warned([1, 0, 1]) == warned([2, 2]) == warned(["B", "yes"]) == warned([1, 2, 3], first_label=1) == []
    assert warned(["2", "2"]) == []  # the choice's own text


def test_choices_of_the_same_tokens_are_named(
    data_section: dict[str, Any], tokenizer: PreTrainedTokenizerBase, write_jsonl: Any
) -> None:
    rows = [{"prompt": f"q{i}", "choices": ["x" * 20 + "a", "x" * 20 + "b"], "label": 1} for i in range(4)]
    task = {"name": "t", "train": write_jsonl("t.jsonl", rows), "validation_size": 2}
    warnings = build(data_section | {"tasks": [task], "max_seq_length": 12}, tokenizer).warnings()
    assert any(text.startswith("task t: 2 questions have a choice of the same tokens") for text in warnings)


def test_the_second_time_loads_the_same(
    data_section: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first = build(data_section, tokenizer)
    folders = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()}
    second = build(data_section, tokenizer)
    assert len(folders) == 2 and all(path.stat().st_mtime_ns == time for path, time in folders.items())
    assert first.fingerprint == second.fingerprint and first.evaluation["test"] == second.evaluation["test"]
    changed = build({**data_section, "max_seq_length": 41}, tokenizer)
    assert changed.fingerprint != first.fingerprint


def test_the_loader_reads_the_store(data_section: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    data = build(data_section, tokenizer)
    loader = TrainLoader(
        data.train,
        task_sizes=data.train_sizes,
        shares=data.shares,
        global_batch_size=40,
        micro_batch_size=20,
        fingerprint=data.fingerprint,
    )
    batches = [batch for _ in range(3) for batch in next(loader)]
    assert sum(int((batch.task_ids == 0).sum()) for batch in batches) == 90
    for batch in batches:
        texts = tokenizer.decode(batch.targets).split("</s>")[:-1]
        assert len(texts) == 20 and set(texts) <= {" yes", *(" " + "x" * n for n in range(31))}
        assert batch.input_ids.shape == batch.position_ids.shape and batch.input_ids.shape[1] <= 20 * 40
