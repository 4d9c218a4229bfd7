"""Whole runs under the launchers people use: what they write and say, and how one rank that fails or hangs ends all."""

import re
import sys
from pathlib import Path

import pytest

from malora_dist.config import load_config
from tests.e2e import SCRIPTS, Finished, contents, deepspeed, files, launch, launch_together, make_folder
from tests.test_train import RUN_FILES, assert_same_run

pytestmark = [pytest.mark.e2e, pytest.mark.slow("real launchers, and a rank that hangs is found after a timeout")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[Finished, dict[str, bytes]]:
    """`malora train` on two processes, which starts `deepspeed`, and what the run folder held then."""
    done = launch([sys.executable, "-m", "malora_dist.cli", "train", "recipe.yaml", "--num_gpus", "2"], folder)
    assert done.code == 0, done.output
    return done, contents(folder / "runs" / "tiny")


@pytest.fixture(scope="module")
def run(first: tuple[Finished, dict[str, bytes]], folder: Path) -> Path:
    return folder / "runs" / "tiny"


def test_deepspeed_leaves_a_whole_run_folder(run: Path, folder: Path) -> None:
    assert files(run) == RUN_FILES
    assert load_config(run / "config.yaml") == load_config(folder / "recipe.yaml")


def test_the_terminal_shows_the_run_and_no_noise(first: tuple[Finished, dict[str, bytes]]) -> None:
    output = first[0].output
    for said in ("run folder runs/tiny, 2 processes on cpu", "note: 4-bit weights are unpacked to float32",
                 "on average over 2 tasks", "runs/tiny/report/index.html", "malora evaluate runs/tiny"):  # fmt: skip
        assert output.count(said) >= 1, f"{said!r} is not in\n{output}"
    noise = re.compile(r"\[(INFO|WARNING)\]|Warning|Failed to load")
    # That there is no GPU is a warning of the launcher's two processes. The run itself says it in its own words.
    left = [line for line in output.splitlines() if noise.search(line) and "Setting accelerator to CPU" not in line]
    assert left == [] and output.count("Setting accelerator to CPU") <= 2


def test_torchrun_gives_the_same_run_beside_the_first(
    run: Path, first: tuple[Finished, dict[str, bytes]], folder: Path
) -> None:
    arguments = ["--standalone", "--nproc_per_node", "2", "-m", "malora_dist.train", "recipe.yaml", "--new-run"]
    done = launch([SCRIPTS / "torchrun", *arguments], folder)
    assert done.code == 0, done.output
    second = run.with_name("tiny-2")
    assert "Results\n  runs/tiny-2/report/index.html" in done.output
    assert files(second) == RUN_FILES and contents(run) == first[1]
    # It can be gone on with by its own config.yaml, which --new-run is no part of.
    wanted = load_config(folder / "recipe.yaml", ["--output_dir", "runs/tiny-2"])
    assert load_config(second / "config.yaml") == wanted
    assert_same_run(second, run)


def test_one_failing_or_hanging_rank_ends_the_launch(folder: Path) -> None:
    """The rank that fails is named once; a rank that hangs is found out after the run's timeout."""
    hung = ["--parallel.timeout_seconds", "20", "--output_dir", "runs/hung"]
    commands = [
        deepspeed(2, "tests.e2e", "fails", "recipe.yaml", "--output_dir", "runs/broken"),
        deepspeed(2, "tests.e2e", "hangs", "recipe.yaml", *hung),
    ]
    fails, hangs = launch_together(commands, folder)
    assert fails.code == 2 and hangs.code == 1
    assert fails.output.count("rows.jsonl:7: only this rank cannot read it\n  met by rank 1") == 1, fails.output
    assert "[rank 0] timed out waiting for another process" in hangs.output and "20000ms" in hangs.output
    assert "Traceback" not in fails.output + hangs.output
