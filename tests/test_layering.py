"""Imports point down only, and in no circle; the lower layers work without torch; tests are beside what they test."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
    ["train", "prepare", "bench", "convert"],
    ["cli"],
    # Entry points for launchers, which run a command of `cli` in their process.
    ["evaluate", "bench.run"],
]
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
WITHOUT_TORCH = ["cli.app", "cli.cluster.app", "config", "config.summary", "config.topology", "launch", "cli.start"]
WITHOUT_TORCH += ["plan", "plan.communication", "report", "tracking.metrics", "tracking.trackers", "adapters.methods"]
WITHOUT_TORCH += ["adapters.malora_config", "optimizers.registry"]
WITHOUT_TORCH += ["errors", "console.terminal", "console.progress", "files.atomic", "files.cache", "files.exit_status"]
# Folders of tests that run whole systems and mirror no module.
WHOLE_SYSTEM = ("slurm", "gpu", "strict", "breaks", "docs", "fuzz")
SOURCES = sorted(PACKAGE.rglob("*.py"))


# Modules that a module names without importing them, and that lead back to it: by file, with the reason.
NAMED_ONLY = {
    "bench/quality/queue.py": "each run of a queue is a process of the program that users run",
    "cli/start.py": "a command starts more processes of its own program",
    "convert/kinds.py": "a registry: a kind names the module that carries it out, imported when it is asked for",
    "launch/slurm/script.py": "a job script names the programs that its processes run",
    "report/page.py": "the package whose folder holds the page's templates",
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in SOURCES}


def unit_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name if name in LAYER else name.partition(".")[0]


def layer_of(name: str) -> str | None:
    """The unit that a module of the package belongs to."""
    inner = name.removeprefix("malora_dist.")
    return next((unit for unit in (inner, inner.partition(".")[0]) if unit in LAYER and inner != name), None)


def tree_of(path: Path) -> ast.Module:
    """A file without what is for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    return tree


def named_modules(path: Path) -> Iterator[str]:
    """The modules of the package that the texts of a file name, as for importlib: `malora_dist.train`, `...:main`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if name in MODULES and name != "malora_dist":
                yield name


def imports(path: Path) -> Iterator[str]:
    """All modules a file imports, inside functions too."""
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "malora_dist")


def leads_to(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, wherever, or names."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inner)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
    if str(path.relative_to(PACKAGE)) not in NAMED_ONLY:
        yield from named_modules(path)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    named = () if str(path.relative_to(PACKAGE)) in NAMED_ONLY else named_modules(path)
    for name in (*imports(path), *named):
        if name.split(".")[0] == "deepspeed":
            assert unit in ("distributed", "training"), f"{path}: only distributed and training import deepspeed"
        other = layer_of(name)
        if other is not None and unit != "__init__":
            assert other == unit or LAYER[other] < LAYER[unit], f"{path}: {unit} must not import {other}"


def test_no_circle_of_imports() -> None:
    """Inside functions and by name neither."""
    graph = {module_of(path): (set(leads_to(path)) & MODULES) - {module_of(path), "malora_dist"} for path in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_what_is_named_only_is_named() -> None:
    for name in NAMED_ONLY:
        assert set(named_modules(PACKAGE / name)), f"{name} names no module: it needs no exception"


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
