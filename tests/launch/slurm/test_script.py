"""Job scripts as text. tests/slurm hands them to a real Slurm."""

import shlex
import shutil
import subprocess
from dataclasses import replace

import pytest

from malora_dist.errors import ConfigError
from malora_dist.launch.slurm.script import (
    ScriptOptions,
    array_script,
    convert_script,
    evaluate_script,
    shipped_scripts,
    train_script,
)
from tests.multiprocess import ROOT

WORDS = ("my recipe's.yaml", "--output_dir", 'runs/a "b" $c', "--adapter.target_modules=[q_proj, v_proj]")


@pytest.mark.parametrize("name", shipped_scripts())
def test_the_scripts_in_slurm_are_what_the_generator_renders(name: str) -> None:
    """CONTRIBUTING.md says how to renew them."""
    assert (ROOT / name).read_text() == shipped_scripts()[name]


@pytest.mark.e2e
@pytest.mark.parametrize("start", ["launcher", "tasks"])
@pytest.mark.parametrize("render", [train_script, array_script, evaluate_script, convert_script])
def test_every_script_is_bash_and_passes_its_words_on(render: object, start: str) -> None:
    job = ScriptOptions(
        start=start, arguments=WORDS, setup=("module load cuda", "source 'my venv/bin/activate'"), processes=3
    )  # type: ignore[arg-type]
    script = render(job)  # type: ignore[operator]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=20).stderr == ""
    (line,) = [line for line in script.splitlines() if line.startswith("set -- ") and "my recipe" in line]
    said = subprocess.run(["bash", "-c", f'{line}\nprintf "%s\\n" "$@"'], text=True, capture_output=True, timeout=20)
    assert tuple(said.stdout.splitlines()) == WORDS
    assert "module load cuda\nsource 'my venv/bin/activate'\n" in script


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_bash() -> None:
    scripts = sorted((ROOT / "malora_dist" / "launch" / "slurm" / "scripts").glob("*.sh"))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert len(scripts) == 9 and done.returncode == 0, done.stdout


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict((*shlex.split(line)[0].split("=", 1), "")[:2] for line in lines)


def test_what_a_job_asks_for() -> None:
    job = ScriptOptions(name="a 'b'", nodes=4, gpus_per_node=2, cpus_per_task=None, time="1:00", output="/r/a b/%j.out",
              sbatch=("--partition=gpu", "--comment=two words"))  # fmt: skip
    found = directives(train_script(job))
    assert found == {
        "job-name": "a 'b'", "nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "2", "time": "1:00",
        "output": "/r/a b/%j.out", "open-mode": "append", "export": "ALL", "requeue": "", "signal": "B:USR1@300",
        "partition": "gpu", "comment": "two words",
    }  # fmt: skip
    tasks = directives(train_script(replace(job, start="tasks")))
    assert tasks["ntasks-per-node"] == "2"
    assert "gpus-per-node" not in directives(train_script(replace(job, gpus_per_node=0)))
    assert directives(array_script(job, tasks="1-9%2"))["array"] == "1-9%2"
    assert not {"requeue", "signal"} & set(directives(evaluate_script(job)))


def test_a_line_break_cannot_become_a_directive() -> None:
    with pytest.raises(ConfigError, match="job-name='a.nb': a job script cannot hold a line break there"):
        train_script(ScriptOptions(name="a\nb"))


def test_srun_is_given_its_flags() -> None:
    script = train_script(ScriptOptions(srun=("--container-image=a b",)))
    assert "'--container-image=a b' \\\n  bash -c" in script
