import sys
from pathlib import Path

import pytest

from malora_dist.cli.app import main
from malora_dist.config import load_config
from malora_dist.errors import MaloraError
from malora_dist.launch.ports import free_port
from malora_dist.launch.ranks import LAUNCHED
from tests.commands import malora, malora_without_torch

RANK = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "n0", "MASTER_PORT": "7"}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name in (*LAUNCHED, "SLURM_STEP_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert malora("init", "r.yaml", "--model", "my/model") == 0
    return "r.yaml"


def make_run(folder: str) -> None:
    """A folder that evaluate takes for that of a run."""
    Path(folder).mkdir(parents=True)
    Path(folder, "config.yaml").write_text("model: {}\n")


def test_init_then_validate(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert malora("validate", recipe, "--world-size", "2", "--adapter.r", "6", "--train.max_steps=7",
               "--train.num_train_epochs", "null") == 0  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert "r.yaml is valid" in out and "my/model" in out
    assert "num_experts 8, top_k 2, r 6, shared_r 16, lora_alpha 12, scaling 2, beta 1" in out
    assert "24 x inputs + 48 x outputs + 768" in out
    assert "16 samples a step = 4 at a time x 2 processes x 2 accumulated" in out and "7 steps" in out
    assert "tasks' files are not on this machine" in out


def test_without_a_world_size_all_that_fit_are_listed(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert malora("validate", recipe, "train.global_batch_size=24") == 0
    assert "on 1, 2, 3, 6 processes" in " ".join(capsys.readouterr().out.split())
    assert malora("validate", recipe, "train.global_batch_size=18") == 2
    assert "Nearest that work" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_an_adapter_given_as_a_run_is_told_from_it(
    recipe: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report of it would be empty."""
    make_run("runs/x")
    for folder, said in {
        "runs/x/adapter": "it has no config.yaml; it is an adapter of the run runs/x",
        "runs/x/checkpoints/step-000004": "it is an adapter of the run runs/x",
        "adapter": "it is an adapter: malora evaluate --adapter adapter --recipe RECIPE",
    }.items():
        Path(folder).mkdir(parents=True)
        Path(folder, "adapter_config.json").write_text("{}")
        assert malora(command, folder) == 2
        assert f"RUN_DIR={folder} is not the folder of a run: " in (err := " ".join(capsys.readouterr().err.split()))
        assert said in err and not Path(folder, "report").exists()


def test_the_run_of_a_new_recipe_has_its_name(recipe: str) -> None:
    assert load_config(recipe).output_dir == "runs/r"


def test_init_never_overwrites(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(recipe).read_text()
    assert malora("init", recipe, "--model", "other") == 2
    assert "will not overwrite r.yaml" in capsys.readouterr().err and Path(recipe).read_text() == before
    assert malora("init", "more/r.yaml", "--with-cluster-files") == 0
    assert Path("more/slurm/train.sbatch").exists()


def test_errors_are_one_message_and_code_2(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert malora("validate", recipe, "--adapter.rr=3", "--train.seed=-1", "--world-size", "2") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert "has 2 errors" in captured.err and "adapter.rr=3" in captured.err and "train.seed=-1" in captured.err
    with pytest.raises(MaloraError):
        main(["validate", recipe, "--adapter.rr=3", "--traceback"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--adapter.r", "3", "r.yaml"], "the recipe must come before its settings"),
        (["prepare", "--adapter.r", "3", "r.yaml"], "the recipe must come before its settings"),
        (["prepare", "none.yaml"], "cannot read the recipe none.yaml"),
        (["train", "r.yaml", "--adapter.shared_r", "2"], "must be at least adapter.r=12"),
        (["train", "r.yaml", "--num_gpus", "3"], "cannot be split"),
        (["train", "none.yaml"], "cannot read the recipe none.yaml"),
        (["evaluate"], "give either RUN_DIR"),
        (["evaluate", "runs/x", "--adapter", "a"], "give either RUN_DIR"),
        (["evaluate", "--adapter", "a"], "belong together"),
        (["evaluate", "runs/none"], "RUN_DIR=runs/none is not the folder of a run"),
        (["report", "runs/none"], "is not the folder of a run: there is no such folder"),
    ],
)
def test_refusals_before_anything_starts(
    recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert malora(*arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.e2e
def test_several_processes_go_through_deepspeed(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command is printed and run, and its exit code is ours; a script stands in for the launcher."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text('#!/bin/sh\necho "started on ${DS_ACCELERATOR:-any}: $*"\nexit 9\n')
    launcher.chmod(0o755)
    monkeypatch.setattr("malora_dist.launch.ssh.launcher.launcher_path", lambda: str(launcher))
    # What a pod or a batch script has set is no launcher.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    port = str(free_port())
    assert malora("train", recipe, "--num_gpus", "2", "--master_port", port, "--adapter.r", "6") == 9
    out, err = capfd.readouterr()
    words = f"--log_level error --num_gpus 2 --master_port {port} --module malora_dist.train r.yaml --adapter.r 6"
    assert out == f"started on cpu: {words}\n" and f"$ {launcher} {words}" in err
    make_run("runs/x")
    assert malora("evaluate", "runs/x", "--num_gpus", "2", "--evaluation.split", "validation") == 9
    assert "--module malora_dist.cli evaluate runs/x --evaluation.split validation\n" in capfd.readouterr().out
    assert malora("evaluate", "--adapter", "a", "--recipe", recipe, "--num_gpus", "2", "--train.seed", "1") == 9
    assert "malora_dist.cli evaluate --adapter a --recipe r.yaml --train.seed 1\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [({}, ["--num_gpus", "1"]), ({"WORLD_SIZE": "2"}, ["--num_gpus", "1"]), (RANK, []), (RANK, ["--num_gpus", "4"])],
)
def test_one_process_or_a_launchers_rank_trains_here(
    recipe: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], arguments: list[str]
) -> None:
    seen: list[list[str]] = []
    trainer = type(sys)("malora_dist.train")
    trainer.main = lambda argv: seen.append(argv)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "malora_dist.train", trainer)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert malora("train", recipe, *arguments, "--adapter.r", "6") == 0
    assert seen == [["r.yaml", "--adapter.r", "6"]]


def test_a_rank_of_a_launcher_starts_no_other_number(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    assert malora("train", recipe, "--num_gpus", "2") == 2
    assert "--num_gpus 2: a launcher has started this process" in " ".join(capsys.readouterr().err.split())
    monkeypatch.delenv("LOCAL_RANK")
    make_run("runs/x")
    assert malora("evaluate", "runs/x") == 2
    assert "WORLD_SIZE=4 are set and LOCAL_RANK is not" in " ".join(capsys.readouterr().err.split())


@pytest.mark.e2e
def test_init_and_validate_work_where_torch_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["init", "r.yaml"], ["validate", "r.yaml", "--world-size", "4"]):
        done = malora_without_torch(*arguments)
        assert done.returncode == 0, done.stderr


def test_lazy_public_names() -> None:
    import malora_dist

    assert malora_dist.MaloraError is MaloraError
    assert all(getattr(malora_dist, name) is not None for name in malora_dist.__all__)
    assert callable(malora_dist.load_config)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = malora_dist.nothing
