"""Whole runs: what they write and say, and how they end when something is wrong. Launchers: test_launchers.py."""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from malora_dist.config import load_config
from malora_dist.tracking.metrics import Record, read_metrics
from malora_dist.train import main
from malora_dist.training import process
from tests.e2e import contents, files, make_folder, run_alone, run_ranks, run_together, write_rows

pytestmark = pytest.mark.e2e

TASKS = ("colour", "animal", "spell")
# Another cut of the same global batch, which changes no number.
WIDE = ("--train.per_device_train_batch_size", "4")
SHORT = ("--train.stop_after_steps", "4", "--train.report_to", "tensorboard", "--output_dir", "runs/short")
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
CHECKPOINT = {
    "manifest.json", "adapter_config.json", "rng.safetensors",
    "adapter-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors",
}  # fmt: skip
RUN_FILES = {
    "config.yaml", "metrics.jsonl", "eval.json", "data.json", "train.log", "report/index.html", "exit.json", ".lock",
    "measured_on.json",
    *(f"adapter/{name}" for name in ADAPTER), "checkpoints/latest", "checkpoints/best",
    *(f"checkpoints/step-{step:06d}/{name}" for step in (3, 6) for name in CHECKPOINT),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The run of two processes."""
    done = run_ranks(2, "malora_dist.train", ["recipe.yaml"], folder)
    assert done.code == 0, done.output
    return folder / "runs" / "tiny"


def records(run: Path, kind: str) -> list[Record]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def test_the_run_folder_holds_everything_and_nothing_else(run: Path, folder: Path) -> None:
    assert files(run) == RUN_FILES
    assert load_config(run / "config.yaml") == load_config(folder / "recipe.yaml")
    assert json.loads((run / "data.json").read_text()).keys() == set(TASKS)
    assert "step 6/6" in (run / "train.log").read_text()
    page = (run / "report" / "index.html").read_text()
    assert all(task in page for task in TASKS) and not re.search(r"""(src|href)=["']?https?:""", page)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 6 * 4, "2 blocks x 6 targets x gate, shared_A, P, B"
    assert all(tensor.dtype == torch.float32 and tensor.abs().sum() > 0 for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == records(run, "run")[0]["trainable_parameters"]


def test_records_have_every_name(run: Path) -> None:
    train = records(run, "train")
    assert [record["step"] for record in train] == [1, 2, 4, 6]
    names = {"loss", "aux_loss", "grad_norm", "tokens_per_second", "step_seconds", "peak_memory_gib", "epoch"}
    for record in train:
        assert all(record[name] > 0 for name in names)
        assert 0 < len(losses := [v for k, v in record.items() if k.startswith("train/")]) <= 3
        assert min(losses) <= record["loss"] + 1e-6 and max(losses) >= record["loss"] - 1e-6
    assert {key.split("/")[1] for record in train for key in record if key.startswith("train/")} == set(TASKS)
    evaluation = records(run, "eval")[0]
    assert evaluation["step"] == 3 and 0 < evaluation["eval/colour/accuracy"] < 1
    assert evaluation["eval/spell/loss"] > 0 and "eval/spell/accuracy" not in evaluation
    routing = records(run, "routing")[-1]
    assert routing["step"] == 6 and set(routing["share"]) == set(TASKS)
    for layers in routing["share"].values():
        assert len(layers) == 12 and all(abs(sum(share) - 1) < 1e-5 for share in layers.values())


def test_eval_json_has_both_sides(run: Path) -> None:
    sides = json.loads((run / "eval.json").read_text())
    assert set(sides) == {"base", "tuned"}
    for side in sides.values():
        assert [task["n"] for task in side["tasks"].values()] == [37, 23, 11]
        for name in ("colour", "animal"):
            assert set(side["tasks"][name]) == {"n", "loss", "accuracy", "accuracy_norm", "stderr", "majority"}
        assert set(side["tasks"]["spell"]) == {"n", "loss"}
        accuracies = [side["tasks"][name]["accuracy"] for name in ("colour", "animal")]
        assert side["average"] == pytest.approx(sum(accuracies) / 2)
    assert sides["tuned"]["tasks"]["spell"]["loss"] < sides["base"]["tasks"]["spell"]["loss"]
    card = (run / "adapter" / "README.md").read_text()
    assert f"| colour | 37 | {sides['tuned']['tasks']['colour']['accuracy']:.3f} |" in card


@pytest.fixture(scope="module")
def alone(run: Path, folder: Path) -> Path:
    """Runs of one process each: `alone` takes more and smaller micro-batches than the two processes, without sharding
    and checkpointing; `short` stops early at ZeRO-3, `drop` looks at the worst task.
    """
    plain = ["--parallel.zero_stage", "0", "--train.gradient_checkpointing", "false", "--output_dir", "runs/alone"]
    plain += ["--train.deterministic", "true"]
    drop = ["--train.best_metric", "worst_drop", "--train.save_total_limit", "1", "--train.eval_steps", "2"]
    drop += ["--train.save_steps", "1", "--parallel.zero_stage", "1", "--output_dir", "runs/drop"]
    commands = [
        ("malora_dist.cli", ["train", "recipe.yaml", "--num_gpus", "1", *plain]),
        ("malora_dist.train", ["recipe.yaml", *WIDE, *SHORT]),
        ("malora_dist.train", ["recipe.yaml", *WIDE, *drop]),
    ]
    whole, short, drops = run_together(commands, folder)
    assert (whole.code, short.code, drops.code) == (0, 75, 0), whole.output + short.output + drops.output
    return run.parent


def test_one_process_gives_the_same_run(run: Path, alone: Path) -> None:
    assert_same_run(alone / "alone", run)


def test_a_run_stopped_early_goes_on_with_more_processes(run: Path, alone: Path, folder: Path) -> None:
    short = alone / "short"
    ended = json.loads((short / "exit.json").read_text())
    assert (ended["outcome"], ended["exit_code"], ended["step"]) == ("preempted", 75, 4)
    assert ended["checkpoint"] == "step-000004" and not (short / "adapter").exists()
    assert [record["learning_rate"] for record in records(short, "train")] == pytest.approx([0, 5e-3, 3e-3])
    done = run_ranks(2, "malora_dist.train", ["recipe.yaml", *SHORT], folder)
    assert done.code == 0, done.output
    for said in ("resuming after step 4, from runs/short/checkpoints/step-000004", "(same numbers to rounding)"):
        assert said in done.output
    assert_same_run(short, run)
    assert json.loads((short / "eval.json").read_text()).keys() == {"base", "tuned"}
    assert done.output.count("base: accuracy") == 0, "the base is not measured again"
    events = {name for name in files(short) if name.startswith("tensorboard/events.out.tfevents")}
    assert len(events) == 2, "one of each start"


def test_the_best_checkpoint_is_that_of_the_best_validation_and_is_kept(alone: Path) -> None:
    run = alone / "drop"
    baseline = json.loads((run / "baseline.json").read_text())["tasks"]
    scores = {}
    for record in records(run, "eval"):
        drops = [record[f"eval/{task}/accuracy"] - baseline[task]["accuracy"] for task in ("colour", "animal")]
        drops.append(math.exp(-record["eval/spell/loss"]) - math.exp(-baseline["spell"]["loss"]))
        scores[record["step"]] = record["eval/worst_drop"]
        assert record["eval/worst_drop"] == pytest.approx(min(drops), abs=1e-12)
    assert list(scores) == [2, 4, 6]
    best = max(scores, key=lambda step: (scores[step], -step))
    assert (run / "checkpoints" / "best").read_text() == f"step-{best:06d}\n"
    kept = {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}
    assert kept == {f"step-{best:06d}", "step-000006"}
    saved = [record["step"] for record in records(run, "checkpoint")]
    assert saved == [1, 2, 3, 4, 5, 6] and all(r["stall_seconds"] > 0 for r in records(run, "checkpoint"))


def test_a_finished_run_is_not_touched(run: Path, folder: Path, alone: Path) -> None:
    before = contents(run)
    done = run_alone("malora_dist.train", ["recipe.yaml", *WIDE], folder)
    assert done.code == 2 and "the run there is finished. --new-run starts another" in done.output
    assert contents(run) == before
    wrong = ["--output_dir", "runs/short", "--train.learning_rate", "1e-3"]
    done = run_alone("malora_dist.train", ["recipe.yaml", *WIDE, *wrong], folder)
    assert done.code == 2 and "finished" in done.output


def test_a_run_that_another_process_holds_is_left_alone(run: Path, folder: Path) -> None:
    before = contents(run)
    with FileLock(run / ".lock"):
        done = run_alone("malora_dist.train", ["recipe.yaml", *WIDE, "--parallel.timeout_seconds", "2"], folder)
    assert done.code == 1 and "runs/tiny: another process is training in it" in done.output, done.output
    assert contents(run) == before


def assert_same_run(found: Path, wanted: Path) -> None:
    """Measured: losses differ by at most 7e-7 and weights by 8e-6, where a step moves them by up to 5e-3."""
    for kind in ("train", "eval"):
        for record, other in zip(records(found, kind), records(wanted, kind), strict=True):
            assert timeless(record) == pytest.approx(timeless(other), abs=5e-6, rel=0)
    tensors, others = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (found, wanted))
    for name, tensor in others.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def timeless(record: Record) -> dict[str, float]:
    """A record without what depends on the machine."""
    return {
        k: v for k, v in record.items() if k not in ("kind", "tokens_per_second", "step_seconds", "peak_memory_gib")
    }


def train_patiently(arguments: Sequence[str]) -> int:
    """Train as a rank that leaves the main one all the time that a busy machine needs to speak and end."""
    process.PATIENCE_SECONDS = 120
    return main(arguments)


def test_mistakes_in_a_recipe_end_all_ranks_and_are_said_once(folder: Path) -> None:
    wrong = ["--adapter.rnk", "8", "--train.warmup_ratio", "3", "--output_dir", "runs/no"]
    done = run_ranks(2, "tests.test_train:train_patiently", ["recipe.yaml", *wrong], folder)
    assert done.code == 2, done.output
    for said in ("adapter.rnk=8: unknown key; did you mean r?", "train.warmup_ratio=3: must be"):
        assert done.output.count(said) == 1, done.output
    assert "Traceback" not in done.output and not (folder / "runs" / "no").exists()


def train_wrongly(wrong: Sequence[str]) -> None:
    """Train where trackers are not installed, once with each of these settings; say how each ends."""
    sys.modules.update({"torch.utils.tensorboard": None, "tensorboardX": None})  # type: ignore[dict-item]
    for number, setting in enumerate(wrong):
        output = f"output_dir=runs/wrong{number}"
        code = main(["recipe.yaml", "train.per_device_train_batch_size=4", output, setting])
        print(f"exit {code}", file=sys.stderr, flush=True)


def test_what_cannot_run_is_refused(folder: Path) -> None:
    """A tracker that is not installed, an indivisible batch, a target that the model has not: no run folder is made."""
    wrong = ["train.report_to=tensorboard", "train.global_batch_size=6", "adapter.target_modules=[q_porj]"]
    done = run_alone("tests.test_train:train_wrongly", wrong, folder)
    tracker, batch, target, _ = done.output.split("exit 2\n")
    assert "pip install 'malora_dist[trackers]'" in tracker
    assert "global_batch_size=6 " in batch and "Traceback" not in done.output
    assert "q_porj" in target and "q_proj" in target
    assert not any((folder / "runs" / f"wrong{number}").exists() for number in range(3))


def test_a_start_that_failed_leaves_its_folder_to_the_corrected_command(folder: Path) -> None:
    """Numbers that belong to the failed one's recipe do not become the other's."""
    run = folder / "runs" / "again"
    short = ["recipe.yaml", *WIDE, "--output_dir", "runs/again", "--train.max_steps", "2", "--train.report_to", "none"]
    short += ["--train.eval_steps", "null"]
    done = run_alone("malora_dist.train", [*short, "--train.learning_rate", "1e30", "--train.max_steps", "3"], folder)
    assert done.code == 1 and "not finite at step 3" in done.output, done.output
    assert json.loads((run / "exit.json").read_text())["outcome"] == "failed"
    (run / "eval.json").write_text(
        json.dumps({"base": {"tasks": {"colour": {"n": 1, "accuracy": 1.0}}, "average": 1.0}})
    )
    # What a pod or a batch script leaves in the environment makes no second process.
    around = {"WORLD_SIZE": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_PORT": "1"}
    (run / "report").touch()
    done = run_alone("malora_dist.train", short, folder, **around)
    # A report that cannot be written is said, and is no failure of the run.
    assert "runs/again has no report" in done.output and (run / "report").is_file()
    assert done.code == 0 and "evaluations are repeated" in done.output, done.output
    assert "again, 1 process on cpu" in done.output
    assert json.loads((run / "eval.json").read_text())["base"]["tasks"]["colour"]["n"] == 37
    assert [record["step"] for record in records(run, "train")] == [1, 2]
    assert json.loads((run / "exit.json").read_text())["outcome"] == "finished"


def test_a_bad_row_ends_all_ranks_and_is_named(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data" / "animal" / "train.jsonl").read_text().splitlines()]
    write_rows(folder / "data" / "bad.jsonl", [*rows[:4], {**rows[4], "label": 7}, *rows[5:]])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["tasks"][1]["train"] = "data/bad.jsonl"
    (folder / "bad.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": "runs/bad"}))
    done = run_ranks(2, "tests.test_train:train_patiently", ["bad.yaml"], folder)
    assert done.code == 2, done.output
    assert done.output.count("data/bad.jsonl:5: field 'label'") == 1 and "Traceback" not in done.output
