"""Imports point down only; the lower layers work without torch; tests are in the folders of what they test."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multiprocess import ROOT

PACKAGE = ROOT / "malora_dist"
LAYERS = [
    ["errors", "console", "ops", "cluster_files"],
    ["files", "optimizers"],
    ["models", "checkpoint", "tracking"],
    ["adapters"],
    ["config"],
    ["data", "launch", "plan", "report"],
    ["distributed", "recipes"],
    ["evaluation"],
    ["training"],
    ["train", "evaluate", "prepare", "bench", "convert"],
    ["cli"],
]
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
WITHOUT_TORCH = ["cli.app", "cli.cluster.app", "config", "config.summary", "config.topology", "launch", "cli.start"]
WITHOUT_TORCH += ["plan", "plan.communication", "report", "tracking.metrics", "tracking.trackers", "adapters.methods"]
WITHOUT_TORCH += ["adapters.malora_config", "optimizers.registry"]
WITHOUT_TORCH += ["errors", "console.terminal", "console.progress", "files.atomic", "files.cache", "files.exit_status"]
# Folders of tests that run whole systems and mirror no module.
WHOLE_SYSTEM = ("slurm", "gpu", "strict", "breaks", "docs", "fuzz")
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
            assert unit in ("distributed", "training"), f"{path}: only distributed and training import deepspeed"
        if parts[0] == "malora_dist" and len(parts) > 1 and unit != "__init__" and parts[1] in LAYER:
            assert parts[1] == unit or LAYER[parts[1]] < LAYER[unit], f"{path}: {unit} must not import {parts[1]}"


def test_every_unit_has_a_layer() -> None:
    assert {unit_of(path) for path in SOURCES} - {"__init__"} <= set(LAYER)


@pytest.mark.e2e
def test_the_lower_layers_need_no_torch() -> None:
    names = ", ".join(f"malora_dist.{module}" for module in WITHOUT_TORCH)
    code = (
        f"import sys; sys.modules['torch'] = None; import malora_dist, {names}; assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_tests_of_a_folder_are_in_the_folder_of_the_same_name() -> None:
    """Files may be named after a module or after what several modules do together."""
    for test in (ROOT / "tests").rglob("*/test_*.py"):
        folder = test.parent.relative_to(ROOT / "tests")
        if folder.parts[0] not in WHOLE_SYSTEM:
            assert (PACKAGE / folder).is_dir(), f"{test.relative_to(ROOT)}: there is no malora_dist/{folder}"
