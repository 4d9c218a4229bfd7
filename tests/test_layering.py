"""Imports point down only; the lower floors work without torch; tests mirror the package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import ROOT

PACKAGE = ROOT / "malora_dist"
FLOORS = {
    8: ["cli", "recipes"],
    7: ["cluster"],
    6: ["train", "evaluate", "prepare", "bench", "start", "convert", "inspect", "local_base"],
    5: ["engine", "positions"],
    4: ["parallel", "model", "checkpoint", "scoring", "plan"],
    3: ["nn", "data", "launch", "summary", "source", "weights", "buffers", "vocabulary"],
    2: ["config", "methods", "report", "trackers", "model_config"],
    1: ["topology", "metrics", "traffic", "cache", "outcome", "progress"],
    0: ["errors", "atomic", "functional", "cluster_files", "terminal", "locks", "json_text"],
}
FLOOR = {unit: floor for floor, units in FLOORS.items() for unit in units}
WITHOUT_TORCH = ["cli", "config", "launch", "plan", "summary", "report", "metrics", "trackers", "topology", "traffic"]
WITHOUT_TORCH += ["methods", "errors", "cache", "outcome", "atomic", "cluster", "terminal"]
# Folders of tests that run whole systems and mirror no module.
WHOLE_SYSTEM = ("slurm", "gpu", "strict", "breaks", "fuzz")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """All modules a file imports, inside functions too, but not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "malora_dist")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "deepspeed":
            assert unit in ("parallel", "engine"), f"{path}: only parallel and engine import deepspeed"
        if parts[0] == "malora_dist" and len(parts) > 1 and unit != "__init__" and parts[1] in FLOOR:
            assert parts[1] == unit or FLOOR[parts[1]] < FLOOR[unit], f"{path}: {unit} must not import {parts[1]}"


def test_every_unit_has_a_floor() -> None:
    assert {unit_of(path) for path in SOURCES} - {"__init__"} <= set(FLOOR)


@pytest.mark.e2e
def test_the_lower_floors_need_no_torch() -> None:
    units = [unit for unit in WITHOUT_TORCH if (PACKAGE / unit).exists() or (PACKAGE / f"{unit}.py").exists()]
    names = ", ".join(f"malora_dist.{unit}" for unit in units)
    code = (
        f"import sys; sys.modules['torch'] = None; import malora_dist, {names}; assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_tests_mirror_the_package() -> None:
    """A test file has the name of the module that it tests, or of the processes beside it whose results it looks at."""
    for test in (ROOT / "tests").rglob("*/test_*.py"):
        if test.parent.name in WHOLE_SYSTEM:
            continue
        folder = PACKAGE / test.parent.relative_to(ROOT / "tests")
        name = test.stem.removeprefix("test_")
        named = (folder / f"{name}.py", test.with_name(f"{name}_workers.py"))
        assert any(path.exists() for path in named), f"{test.relative_to(ROOT)} tests no {folder.name}/{name}.py"
