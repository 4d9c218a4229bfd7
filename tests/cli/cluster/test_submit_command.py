"""What `malora launch slurm` refuses, renders and hands to sbatch. tests/slurm has a real Slurm."""

import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from malora_dist.config import load_config
from malora_dist.files.exit_status import FINISHED, write_exit_status
from tests.commands import malora, malora_without_torch

pytestmark = pytest.mark.e2e

# Shows how it was called, and remembers what it was given.
SBATCH = """#!/usr/bin/env bash
count=$(ls submitted | wc -l)
cat > "submitted/$count"
printf '%s\\n' "$*" > "submitted/$count.flags"
env | grep ^SLURM_ > "submitted/$count.env"
[ "$count" = "$REFUSE" ] && { echo "sbatch: error: Invalid partition name specified" >&2; exit 1; }
echo "$((100 + count / 3));cluster"
"""
run = partial(malora, "launch", "slurm")
SCANCEL = '#!/usr/bin/env bash\necho "$*" >> cancelled\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, its data, and programs that stand in for Slurm's."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "submitted").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    for name in [*filter(lambda name: name.startswith("SLURM_"), os.environ), "REFUSE"]:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "t.jsonl").write_text("{}\n")
    write_recipe(tmp_path / "my recipe's.yaml")
    return tmp_path


def write_recipe(path: Path, **more: object) -> None:
    task = {"name": "t", "train": "t.jsonl", "test": "t.jsonl"}
    recipe = {"model": {"name_or_path": "my/model"}, "data": {"tasks": [task]}, "output_dir": "runs/a b"}
    recipe |= {"train": {"global_batch_size": 32}, **more}
    path.write_text(yaml.safe_dump(recipe))


def submitted(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted((folder / "submitted").glob("?"))]


def words(script: str) -> list[str]:
    (line,) = [line for line in script.splitlines() if line.startswith("set -- ")]
    return shlex.split(line)[2:]


RECIPE = "my recipe's.yaml"
SMALL = ("--nodes", "2", "--gpus-per-node", "4")


def test_a_chain_is_submitted_and_written_down(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ("--after", "train,evaluate,convert", "--convert-to", "peft-experts")
    assert run(RECIPE, *SMALL, *stages, "--time", "1:00:00", "--adapter.r", "6", "--train.seed=7", "--",
               "--partition=gpu", "--comment=a b") == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "submitted train as job 100; log" in said and "submitted convert as job 102, after job 101" in said
    assert "malora launch follow 'runs/a b'" in said and "was not checked" in said
    scripts = submitted(folder)
    (kept,) = (folder / "runs/a b/slurm").glob("recipe-*.yaml")
    config = yaml.safe_load(kept.read_text())
    assert (config["adapter"]["r"], config["train"]["seed"], config["output_dir"]) == (6, 7, "runs/a b")
    assert load_config(kept) == load_config(RECIPE, ["--adapter.r", "6", "--train.seed=7"])
    assert [words(script) for script in scripts] == [
        [str(kept)],
        ["runs/a b"],
        ["runs/a b", "runs/a b/export", "--to", "peft-experts"],
    ]
    flags = [(folder / f"submitted/{3 * i}.flags").read_text() for i in range(3)]
    chained = "--parsable --dependency=afterok:10{} --kill-on-invalid-dep=yes --partition=gpu --comment=a b\n"
    assert flags == ["--parsable --partition=gpu --comment=a b\n", chained.format(0), chained.format(1)]
    home = folder / "runs/a b/slurm"
    assert f"#SBATCH --output='{home}/train_%j.out'" in scripts[0] and "--gpus-per-node=4" in scripts[0]
    assert "gpus-per-node" not in scripts[2]
    jobs = [json.loads(line) for line in (home / "jobs.jsonl").read_text().splitlines()]
    assert [(job["job"], job["stage"], job["after"], job["array"]) for job in jobs] == [
        ("100", "train", None, None), ("101", "evaluate", "100", None), ("102", "convert", "101", None),
    ]  # fmt: skip
    assert jobs[0]["log"] == f"{home}/train_100.out"
    assert (home / "train_100.sbatch").read_text() == scripts[0]


def test_a_recipe_that_trusts_code_says_so_at_each_stage(folder: Path) -> None:
    """What stands in the run's folder is not enough for those that read it."""
    stages = ("--after", "train,evaluate,convert")
    assert run(RECIPE, *SMALL, *stages, "--model.trust_remote_code", "true") == 0
    train, evaluate, convert = map(words, submitted(folder))
    assert evaluate == ["runs/a b", "--model.trust_remote_code", "true"]
    assert convert == ["runs/a b", "runs/a b/export", "--to", "adapter", "--recipe", *train]


def test_a_job_does_not_inherit_the_job_it_is_submitted_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    assert run(RECIPE, *SMALL) == 0
    assert (folder / "submitted/0.env").read_text() == "SLURM_CONF=/etc/x\n"


def test_a_refused_job_takes_its_chain_with_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSE", "3")
    assert run(RECIPE, *SMALL, "--after", "train,evaluate") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "sbatch refuses the job: sbatch: error: Invalid partition name" in error
    assert (folder / "cancelled").read_text() == "100\n"
    assert "job 100 (train), submitted before that, is cancelled" in error


def test_arrays(folder: Path) -> None:
    assert run(RECIPE, *SMALL, "--array", "seeds=1-3%2", "--adapter.r=6") == 0
    (script,) = submitted(folder)
    assert "#SBATCH --array=1-3%2" in script and "MALORA_RUNS='runs/a b'" in script
    assert "train_%A_%a.out" in script and len(words(script)) == 1
    assert json.loads((folder / "runs/a b/slurm/jobs.jsonl").read_text())["array"] == "1-3%2"
    write_recipe(folder / "b.yaml", output_dir="runs/b")
    assert run(RECIPE, *SMALL, "--array", "recipes=b.yaml") == 0
    script = submitted(folder)[1]
    assert "#SBATCH --array=1-2" in script and "\nMALORA_RUNS=" not in script
    homes = [folder / "runs/a b/slurm", folder / "runs/b/slurm"]
    assert [Path(word).parent for word in words(script)] == homes
    noted = json.loads((folder / "runs/b/slurm/jobs.jsonl").read_text())
    assert noted["job"] == "101_2" and noted["log"].endswith("train_101_2.out")


def test_dry_run_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(RECIPE, *SMALL, "--after", "train,evaluate", "--dry-run", "--", "-p", "gpu") == 0
    said = capsys.readouterr().out
    assert said.startswith("$ sbatch --parsable -p gpu <<'SCRIPT'\n#!/usr/bin/env bash\n")
    assert "--dependency=afterok:JOB --kill-on-invalid-dep=yes" in said
    assert submitted(folder) == [] and not (folder / "runs").exists()


def test_the_recipe_says_what_every_job_needs(folder: Path) -> None:
    launch = {
        "setup": "module load cuda\nsource venv/bin/activate",
        "sbatch": "--account=me -pgpu",
        "srun": ["--mpi=none"],
    }
    write_recipe(folder / "b.yaml", launch=launch)
    assert run("b.yaml", *SMALL, "--start", "tasks", "--gpu-type", "a100") == 0
    (script,) = submitted(folder)
    assert "\nmodule load cuda\nsource venv/bin/activate\n" in script
    assert "#SBATCH --account=me\n#SBATCH -pgpu\n" in script and "--mpi=none" in script
    assert "#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-node=a100:4\n#SBATCH --cpus-per-task=4\n" in script
    assert "torchrun" not in script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((RECIPE, "--nodes", "3", "--gpus-per-node", "1"), "cannot be split"),
        ((RECIPE, "--adapter.rr", "3"), "adapter.rr"),
        (("none.yaml",), "cannot read the recipe none.yaml"),
        ((RECIPE, "--new-run"), "--new-run: a job that is restarted must resume its run"),
        ((RECIPE, "--train.resume_from_checkpoint", "null"), "must resume its run"),
        ((RECIPE, "--after", ""), "'' is none of train, evaluate, convert"),
        ((RECIPE, "--after", "train,serve"), "'serve' is none of train, evaluate, convert"),
        ((RECIPE, "--convert-to", "peftt"), "--to peftt: unknown kind"),
        ((RECIPE, "--time", "5"), "--save-before=300 must be less than the 300 seconds of --time=5"),
        ((RECIPE, "--start", "mpi"), "must be launcher or tasks"),
        ((RECIPE, "--array", "seeds=a"), "--array=seeds=a: must be seeds=1-5"),
        ((RECIPE, "--array", "seeds=1-2", "--after", "train,convert"), "--after train,convert with --array"),
        ((RECIPE, "--array", f"recipes={RECIPE}"), "recipes share an output_dir"),
        ((RECIPE, "--", "--nodes=9"), "--nodes=9: not after --; use --nodes"),
        ((RECIPE, "--", "-N9"), "-N9: not after --; use --nodes"),
        ((RECIPE, "--launch.sbatch=--output=x"), "--output=x: not in launch.sbatch; use nothing: logs are in"),
        ((RECIPE, "--gpu-type", "a:1"), "--gpu-type=a:1: must be Slurm's name of a GPU"),
        ((RECIPE, "--launch.setup", '["a\\nb"]'), "launch.setup[0]"),
        ((RECIPE, "--launch.sbatch", "account"), "launch.sbatch='account': must be flags of one word each"),
        ((RECIPE, "--launch.max_restarts", "-1"), "launch.max_restarts=-1"),
    ],
)
def test_refusals_before_slurm_is_asked(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(*arguments[:1], *SMALL[: 0 if "--nodes" in arguments else 4], *arguments[1:]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert submitted(folder) == [] and not (folder / "runs").exists()


def test_a_plan_that_does_not_fit_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.resources import files

    shape = str(next(path for path in (files("malora_dist") / "recipes/models").iterdir() if "7b" in path.name.lower()))
    assert run(RECIPE, *SMALL, "--model", shape, "--hbm", "2GiB") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "does not fit into GPUs of --hbm 2GiB" in error and submitted(folder) == []
    assert run(RECIPE, *SMALL, "--model", shape) == 0
    assert "It fits" in " ".join(capsys.readouterr().out.split())


def test_a_finished_run_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs/a b").mkdir(parents=True)
    (folder / "runs/a b/config.yaml").touch()
    write_exit_status(folder / "runs/a b", FINISHED, 0, reason="", step=1, checkpoint=None)
    assert run(RECIPE, *SMALL) == 2
    assert "the run there is finished" in " ".join(capsys.readouterr().err.split())
    assert run(RECIPE, *SMALL, "--after", "evaluate") == 0
    assert words(submitted(folder)[0]) == ["runs/a b"]


def test_without_slurm_and_without_torch(folder: Path) -> None:
    command = ["launch", "slurm", RECIPE, *SMALL]
    assert malora_without_torch(*command).returncode == 0
    (folder / "bin/sbatch").unlink()
    python = str(Path(sys.executable).parent)
    done = malora_without_torch(*command, PATH=python)
    assert done.returncode == 2 and "cannot run sbatch" in done.stderr and "login node" in done.stderr


@pytest.mark.parametrize(
    ("scancel", "outcome"),
    [
        ("exit 0", "is cancelled"),
        ("echo 'scancel: error: Kill job error on job id 100: Invalid job id specified' >&2; exit 1", "is cancelled"),
        ("echo 'scancel: error: Kill job error: Access/permission denied' >&2; exit 1",
         "could not be cancelled (scancel refuses: scancel: error: Kill job error: Access/permission denied)"),
        ("exit 3", "could not be cancelled (scancel refuses: exit code 3)"),
    ],
)  # fmt: skip
def test_jobs_that_run_on_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scancel: str, outcome: str
) -> None:
    """Each job before a refused one is cancelled, whatever becomes of the others, and the refusal is still said."""
    (folder / "bin" / "scancel").write_text(f'{SCANCEL}[ "$1" = 100 ] || exit 0\n{scancel}\n')
    monkeypatch.setenv("REFUSE", "6")
    assert run(RECIPE, *SMALL, "--after", "train,evaluate,convert") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Invalid partition name" in error and (folder / "cancelled").read_text() == "100\n101\n"
    end = "" if outcome == "is cancelled" else "; end it yourself: scancel 100"
    assert f"job 100 (train), submitted before that, {outcome}{end}" in error
    assert "job 101 (evaluate), submitted before that, is cancelled" in error


def test_a_full_disk_leaves_no_job_that_nobody_knows(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full once Slurm has taken the job: a folder stands where its script belongs."""
    (folder / "runs/a b/slurm/train_100.sbatch").mkdir(parents=True)
    assert run(RECIPE, *SMALL) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "cannot be written" in error and "job 100 (train), submitted before that, is cancelled" in error
    assert (folder / "cancelled").read_text() == "100\n"
