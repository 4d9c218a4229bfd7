"""Evaluating a run again, alone and on three processes: the same numbers, and nothing measured before is lost."""

import json
import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from malora_dist.config.evaluation_target import EvaluationTarget, evaluation_target
from malora_dist.console.log import LOGGER
from malora_dist.errors import ConfigError
from malora_dist.evaluate import main
from malora_dist.files.atomic import write_json
from malora_dist.tracking.metrics import read_metrics
from malora_dist.training import evaluation_run
from malora_dist.training.run_folder import evaluation_file
from tests.checkpoint.disks import forbidden
from tests.config.recipes import recipe
from tests.e2e import contents, make_folder, run_alone, run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run in `runs/tiny`, made by one process."""
    path = make_folder(tmp_path_factory.mktemp("evaluate"))
    settings = ["--num_gpus", "1", "--train.max_steps", "4", "--parallel.zero_stage", "0"]
    done = run_alone("malora_dist.cli", ["train", "recipe.yaml", *settings], path)
    assert done.code == 0, done.output
    return path


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same tasks and accuracies, and losses within 1e-5."""
    assert found["average"] == wanted["average"] and found["tasks"].keys() == wanted["tasks"].keys()
    for name, task in wanted["tasks"].items():
        others = {key: value for key, value in found["tasks"][name].items() if key != "loss"}
        assert others == {key: value for key, value in task.items() if key != "loss"}, name
        assert found["tasks"][name]["loss"] == pytest.approx(task["loss"], abs=1e-5, rel=0), name


@pytest.mark.e2e
def test_three_processes_measure_the_same(folder: Path) -> None:
    """ZeRO-3, uneven shares of 71 questions, and a training batch that three processes could not share."""
    run = folder / "runs" / "tiny"
    before, others = read(run / "eval.json"), {k: v for k, v in contents(run).items() if k != "eval.json"}
    done = run_ranks(3, "malora_dist.evaluate", ["runs/tiny", "--parallel.zero_stage", "3"], folder)
    assert done.code == 0, done.output
    assert "wrote runs/tiny/eval.json" in done.output and "Average accuracy" in done.output
    after = read(run / "eval.json")
    assert after.keys() == before.keys() == {"base", "tuned"}
    for side in before:
        assert_equal(after[side], before[side])
    now = contents(run)
    assert {k: v for k, v in now.items() if k not in ("eval.json", "evaluate.log")} == others
    assert "evaluate.log" in now


@pytest.mark.e2e
def test_one_process_with_other_settings_writes_beside(folder: Path) -> None:
    run = folder / "runs" / "tiny"
    before = (run / "eval.json").read_bytes()
    settings = ["--evaluation.base", "false", "--evaluation.batch_tokens", "97", "--evaluation.write_scores", "true"]
    done = run_alone("malora_dist.cli", ["evaluate", "runs/tiny", "--num_gpus", "1", *settings], folder)
    assert done.code == 0, done.output
    assert (run / "eval.json").read_bytes() == before
    other = read(run / "eval-2.json")
    assert other.keys() == {"tuned"}
    assert_equal(other["tuned"], json.loads(before)["tuned"])
    assert not (run / "scores-base-2.jsonl").exists()
    records = [json.loads(line) for line in (run / "scores-tuned-2.jsonl").read_text().splitlines()]
    for task, row in other["tuned"]["tasks"].items():
        mine = [record for record in records if record["task"] == task]
        assert [record["question"] for record in mine] == list(range(row["n"]))
        if "accuracy" in row:
            hits = [max(record["scores"]) == record["scores"][record["label"]] for record in mine]
            assert sum(hits) / len(hits) == row["accuracy"], task
    assert "--evaluation.batch_tokens 97" in (run / "evaluate.log").read_text(), "says how eval-2.json came about"


@pytest.mark.e2e
def test_results_of_a_run_of_somebody_else(folder: Path, tmp_path: Path) -> None:
    """Where its folder cannot be written: to another file, on the terminal alone, or not at all."""
    run = folder / "runs" / "tiny"
    before = contents(run)
    fast = ["--evaluation.base", "false", "--parallel.zero_stage", "0"]
    command, to_file = "malora_dist.evaluate", ["runs/tiny", "--output", tmp_path / "mine.json", *fast]
    elsewhere = run_ranks(2, command, to_file, folder)
    printed = run_alone(
        f"{__name__}:refused_afterwards", ["runs/tiny", "--output", tmp_path / "lost.json", *fast], folder
    )
    refused = run_ranks(2, command, ["runs/tiny", "--output", "/proc/mine.json", *fast], folder)
    again = run_alone(command, to_file, folder)
    only_shown = run_alone(command, ["runs/tiny", "--no-save", *fast], folder)
    assert contents(run) == before
    for done in (elsewhere, only_shown):
        assert done.code == 0 and "Accuracy in %" in done.output and "evaluating runs/tiny" in done.output, done.output
    assert read(tmp_path / "mine.json")["tuned"]["tasks"].keys() == read(run / "eval.json")["tuned"]["tasks"].keys()
    assert again.code == 2 and f"--output {tmp_path}/mine.json exists" in again.output
    # Before the model is loaded, and by both processes, of which neither waits for the other.
    assert refused.code == 2 and "reading the base model" not in refused.output
    assert "/proc cannot be written: " in refused.output and "--no-save only prints it" in refused.output
    assert printed.code == 1 and not (tmp_path / "lost.json").exists()
    before_error, _, after = printed.output.partition("Accuracy in %")
    assert "the result is printed above" in after and "the result is printed above" not in before_error


def refused_afterwards(arguments: list[str]) -> int:
    """Evaluate, and find a full disk at the end."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    evaluation_run.write_json = full
    return main(arguments)


@pytest.mark.e2e
def test_an_adapter_on_its_own_with_a_recipe(folder: Path) -> None:
    """A checkpoint gives what the validation during training gave at its step; the result lies in its folder."""
    run, adapter = folder / "runs" / "tiny", folder / "runs" / "tiny" / "checkpoints" / "step-000003"
    before = {name: data for name, data in contents(run).items() if "step-000003" not in name}
    settings = ["--evaluation.split=validation", "--parallel.zero_stage=0"]
    done = run_alone("malora_dist.evaluate", ["--recipe", "recipe.yaml", "--adapter", adapter, *settings], folder)
    assert done.code == 0, done.output
    assert {name: data for name, data in contents(run).items() if "step-000003" not in name} == before
    tuned = read(adapter / "eval.json")["tuned"]["tasks"]
    record = next(r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "eval" and r["step"] == 3)
    for name, task in tuned.items():
        assert task["n"] == 9
        assert task["loss"] == pytest.approx(record[f"eval/{name}/loss"], abs=1e-5, rel=0)
        assert task.get("accuracy") == record.get(f"eval/{name}/accuracy")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "give either RUN_DIR"),
        (["runs/none"], "RUN_DIR=runs/none is not the folder of a run: there is no such folder"),
        (["--adapter", "a"], "belong together"),
        (["--adapter"], "'--adapter' requires an argument"),
        (["--local_rank=0", "runs/none"], "RUN_DIR=runs/none"),
        (["--adapter", "none", "--recipe", "recipe.yaml"], "none is not an adapter folder"),
    ],
)
def test_wrong_arguments_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(logging.getLogger(LOGGER), "handlers", [])
    assert main(arguments) in (1, 2)
    assert part in capsys.readouterr().err and not (folder / "none").exists()


def test_a_run_cannot_let_code_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a setting beside it can, or a recipe that is named; whatever else the run says."""
    monkeypatch.setattr(logging.getLogger(LOGGER), "handlers", [])
    run = tmp_path / "somebody's run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(recipe(model={"trust_remote_code": True})))
    assert main([str(run), "--evaluation.base=false"]) == 2
    told = f"malora evaluate {shlex.join([str(run), '--evaluation.base=false'])} --model.trust_remote_code true"
    assert told in capsys.readouterr().err
    settings = [["--model.trust_remote_code", "true"], ["model.trust_remote_code=false"]]
    named = [["--adapter", str(run), "--recipe", str(run / "config.yaml")]]
    for arguments in [*([str(run), *setting] for setting in settings), *named]:
        assert main(arguments) in (1, 2)
        assert "is not an adapter folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    target = EvaluationTarget(tmp_path, "recipe.yaml", ("--train.seed=1",), tmp_path)
    elsewhere = replace(target, output=tmp_path / "mine.json")
    for one in (target, elsewhere):
        one.check_output()
    with forbidden(tmp_path):
        for one in (target, elsewhere):
            with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written: Permission denied.*--no-save"):
                one.check_output()
        replace(target, save=False).check_output()
    with pytest.raises(ConfigError, match="none cannot be written: No such file"):
        replace(target, output=tmp_path / "none" / "mine.json").check_output()
    assert not list(tmp_path.iterdir())
    assert elsewhere.words() == [
        "--adapter", str(tmp_path), "--recipe", "recipe.yaml", "--output", f"{tmp_path}/mine.json", "--train.seed=1",
    ]  # fmt: skip
    assert [one.log_file for one in (target, elsewhere)] == [tmp_path / "evaluate.log", None]
    with pytest.raises(ConfigError, match="exclude each other"):
        evaluation_target(None, "a", "b", [], output=tmp_path / "x", save=False)


def test_where_a_result_goes(tmp_path: Path) -> None:
    """eval.json if nothing in it is lost, else the next number."""
    base = {"tasks": {"a": {"n": 10, "loss": 2.5, "accuracy": 0.4}}, "average": 0.4}
    moved = {"tasks": {"a": {"n": 10, "loss": 2.5, "accuracy": 0.5}}, "average": 0.5}
    assert evaluation_file(tmp_path, {"base": base}).name == "eval.json"
    write_json(tmp_path / "eval.json", {"base": base})
    rounded = {"tasks": {"a": {"n": 10, "loss": 2.500001, "accuracy": 0.4}}, "average": 0.4}
    assert evaluation_file(tmp_path, {"base": rounded}).name == "eval.json"
    assert evaluation_file(tmp_path, {"base": base, "tuned": moved}).name == "eval.json", "completes it"
    assert evaluation_file(tmp_path, {"tuned": moved}).name == "eval-2.json"
    assert evaluation_file(tmp_path, {"base": moved}).name == "eval-2.json"
    write_json(tmp_path / "eval-2.json", {"base": moved})
    assert evaluation_file(tmp_path, {"base": moved}).name == "eval-2.json"
    (tmp_path / "eval.json").write_text('{"base": {"ta')
    assert evaluation_file(tmp_path, {"base": base}).name == "eval-3.json"
