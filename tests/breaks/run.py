"""Deliberate breaks of the package, and whether the tests that should catch them do.

breaks.yaml lists them. Each has a `name`; the `file`; `old`, a text that occurs in it once, and `new` in its place;
what is then `wrong` for a user; and the `tests` that should catch it, as files.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("breaks.yaml")
FAILURE = re.compile(r"^(FAILED|ERROR) (\S*::.*)$", re.MULTILINE)
# Longer than any file of tests takes on a busy machine.
SECONDS = 2400
# A test may take longer than it should where breaks run side by side, and that is not what it is to find.
TEST_SECONDS = 1200


@dataclass(frozen=True, kw_only=True)
class Break:
    """A row of breaks.yaml."""

    name: str
    file: str
    old: str
    new: str
    wrong: str
    tests: tuple[str, ...]

    def problems(self, root: Path) -> Iterator[str]:
        """Say what keeps this break from being made in `root`."""
        path = root / self.file
        found = path.read_text(encoding="utf-8").count(self.old) if path.is_file() else 0
        if found != 1:
            yield f"{self.name}: {self.file} must hold its `old` once, and holds it {found} times"
        yield from (f"{self.name}: there is no {test}" for test in self.tests if not (root / test).is_file())

    def apply(self, root: Path) -> None:
        """Break the package in `root`. Raises ValueError, with the file and the rule, where that is not possible."""
        if problems := list(self.problems(root)):
            raise ValueError("\n".join(problems))
        path = root / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What became of a break: the first test that failed, and how; or why none did."""

    caught: bool
    first_failing_test: str | None
    seconds: float
    said: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def read_breaks() -> list[Break]:
    """Return the rows of breaks.yaml."""
    rows = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return [Break(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def copy_tracked(source: Path, target: Path) -> None:
    """Copy all files that git tracks, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=source, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        # Deleted, and not yet committed so.
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name, follow_symlinks=False)


def run_break(broken: Break, source: Path = ROOT) -> Outcome:
    """Make a break in a copy of the repository, and run its tests there. Raises ValueError as `Break.apply` does."""
    with tempfile.TemporaryDirectory(prefix="break-", ignore_cleanup_errors=True) as name:
        copy = Path(name, "repository")
        copy_tracked(source, copy)
        broken.apply(copy)
        began = time.monotonic()
        code, output = _run_tests(copy, broken.tests)
        return _outcome(code, output, round(time.monotonic() - began, 1))


def _run_tests(copy: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Return pytest's exit code, None if it took too long, and what it said; what it has started ends with it."""
    # A cache of its own: what a broken package writes there is for nobody else.
    own = {
        "PYTHONPATH": str(copy),
        "OMP_NUM_THREADS": "1",
        "MALORA_CACHE": str(copy.with_name("cache")),
        "COLUMNS": "400",
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    options = ["-q", "-x", f"--timeout={TEST_SECONDS}", f"--basetemp={copy.with_name('tmp')}", "-p", "no:cacheprovider"]
    # That a busy machine is slow says nothing about a break.
    options += ["-o", "slow_seconds=0"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=copy,
            env={**os.environ, "PATH": path, **own},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        output.seek(0)
        return code, output.read()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _outcome(code: int | None, output: str, seconds: float) -> Outcome:
    """Caught is what makes a test fail: not that pytest cannot even begin, or takes for ever."""
    # A test that fails may make the end of its fixtures fail, of which pytest tells first.
    failures = sorted(FAILURE.findall(output), key=lambda found: found[0] == "ERROR")
    if code == 1 and failures:
        test, _, said = failures[0][1].partition(" - ")
        return Outcome(True, test, seconds, said)
    ends = {0: "all tests pass", None: f"still running after {SECONDS} s"}
    return Outcome(False, None, seconds, ends.get(code, f"pytest exits {code}\n{output[-3000:]}"))
