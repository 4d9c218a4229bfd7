import configparser
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from malora_dist.config import load_config
from malora_dist.config.compatibility import check_plan, suggest_world_sizes
from malora_dist.launch.files import cluster_files
from tests.multiprocess import ROOT

SUFFIXES = (".py", ".yaml", ".json", ".sh", ".html")
FOLDERS = ("ds_configs", "launchers", "slurm")
# What is built into a wheel, and what only a source distribution holds beside it.
BUILT = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "malora_dist")
SOURCE_ONLY = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "Makefile",
    "constraints.txt",
    "mkdocs.yml",
    "ruff.toml",
)
SOURCE_FOLDERS = ("benchmarks", "docs", "examples", *FOLDERS)
BUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"
STUB = '#!/usr/bin/env bash\nprintf "%s" "$(basename "$0")"; printf " [%s]" "$@"; echo\n'


def test_cluster_files_are_the_same_in_both_places() -> None:
    shown = {str(path.relative_to(ROOT)): path.read_text() for name in FOLDERS for path in (ROOT / name).rglob("*.*")}
    assert shown == cluster_files() and len(shown) >= 9


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of the built wheel and source distribution, and a copy of what they were built from.

    They are built as pip does it, from a copy, because a build leaves files behind.
    """
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in (*BUILT, *SOURCE_ONLY, *SOURCE_FOLDERS):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=source, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return folder, source


@pytest.mark.e2e
def test_the_wheel_holds_everything(built: tuple[Path, Path]) -> None:
    folder, source = built
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        names = set(archive.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "malora = malora_dist.cli:main" in archive.read(entry).decode()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        assert "License-Expression: Apache-2.0" in metadata and "License-File: LICENSE" in metadata
    expected = [path for path in (source / "malora_dist").rglob("*") if path.suffix in SUFFIXES]
    expected += [source / "malora_dist/py.typed", source / "malora_dist/cluster_files/slurm/README.md"]
    missing = {str(path.relative_to(source)) for path in expected} - names
    assert not missing
    assert not any(name.startswith("tests") for name in names)


@pytest.mark.e2e
def test_the_source_distribution_holds_everything(built: tuple[Path, Path]) -> None:
    folder, source = built
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    shown = [path for name in SOURCE_FOLDERS for path in (source / name).rglob("*") if path.is_file()]
    shown += [source / name for name in (*BUILT, *SOURCE_ONLY) if (source / name).is_file()]
    missing = {str(path.relative_to(source)) for path in shown if "__pycache__" not in path.parts} - names
    assert not missing


@pytest.mark.parametrize("extra", ["report", "gguf", "sentencepiece", "kernels", "bench", "trackers"])
def test_the_tests_environment_has_every_extra(extra: str) -> None:
    """What the package asks people to install by an extra is installed where tests run, in the same range."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    assert set(extras[extra].split()) <= set(extras["dev"].split())


def test_every_pin_is_a_requirement_or_of_one() -> None:
    """A pin in constraints.txt lies in the range setup.cfg gives."""
    from packaging.requirements import Requirement

    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    texts = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    ranges = {r.name.lower(): r for r in (Requirement(line) for text in texts for line in text.split("\n") if line)}
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().split()]
    assert {"torch", "deepspeed", "transformers"} <= {pin.name for pin in pins}
    for pin in pins:
        version = next(iter(pin.specifier)).version
        if pin.name.lower() in ranges:
            assert ranges[pin.name.lower()].specifier.contains(version), pin


@pytest.mark.parametrize("path", sorted((ROOT / "malora_dist/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    config = load_config(path)
    for world in suggest_world_sizes(config):
        check_plan(config, world)
    assert suggest_world_sizes(config)


def stubs(folder: Path, *names: str) -> dict[str, str]:
    for name in names:
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def bash(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(ROOT / script), *arguments], env=env, capture_output=True, text=True, timeout=30)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("script", "settings", "line"),
    [
        ("single_node.sh", {}, "malora [launch] [deepspeed] [r.yaml] [a b]"),
        (
            "single_node.sh",
            {"NUM_GPUS": "4"},
            "malora [launch] [deepspeed] [r.yaml] [--num_gpus] [4] [a b]",
        ),
        (
            "multi_node.sh",
            {"HOSTFILE": "h"},
            "malora [launch] [deepspeed] [r.yaml] [--hostfile] [h] [a b]",
        ),
        (
            "multi_node.sh",
            {"HOSTFILE": "h", "MASTER_PORT": "7"},
            "malora [launch] [deepspeed] [r.yaml] [--hostfile] [h] [--master_port] [7] [a b]",
        ),
        (
            "torchrun.sh",
            {},
            "malora [launch] [torchrun] [r.yaml] [a b]",
        ),
        (
            "torchrun.sh",
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n0", "NPROC_PER_NODE": "8"},
            "malora [launch] [torchrun] [r.yaml] [--nnodes] [2] [--node_rank] [1] [--master_addr] [n0] "
            "[--master_port] [29500] [--nproc_per_node] [8] [a b]",
        ),
    ],
)
def test_launchers(tmp_path: Path, script: str, settings: dict[str, str], line: str) -> None:
    env = stubs(tmp_path, "malora") | settings
    done = bash(f"launchers/{script}", "r.yaml", "a b", env=env)
    assert (done.returncode, done.stdout) == (0, line + "\n"), done.stderr
    assert "usage" in bash(f"launchers/{script}", env=env).stderr


@pytest.mark.e2e
def test_a_batch_script_on_many_nodes(tmp_path: Path) -> None:
    """With a scontrol of many nodes, an srun that runs one task, and a torchrun that shows its arguments."""
    env = stubs(tmp_path, "torchrun")
    (tmp_path / "scontrol").write_text("#!/usr/bin/env bash\nfor i in $(seq 20000); do echo node$i; done\n")
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    env |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1",
            "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16"}  # fmt: skip
    env["SLURM_JOB_NAME"] = str(tmp_path / "my job")
    done = bash("slurm/eval.sbatch", "my run", "--evaluation.split", "test", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "torchrun [--nnodes] [2] [--node_rank] [1] [--nproc_per_node] [4] [--rdzv_id] [41234] "
        "[--master_addr] [node1] [--master_port] [11234] "
        f"[--no_python] [bash] [{tmp_path}/my job_41234/process.sh] "
        "[malora_dist.evaluate] [my run] [--evaluation.split] [test]\n"
    )
    assert "usage" in bash("slurm/eval.sbatch", env=env).stderr


def test_pyproject_is_only_the_build_system() -> None:
    assert len((ROOT / "pyproject.toml").read_text().splitlines()) == 3
    assert yaml.safe_load((ROOT / "ds_configs/zero3.json").read_text())["zero_optimization"]["stage"] == 3
