"""Sorts tests into tiers, by what they start: unit, distributed, e2e, slurm, gpu.

A test without a mark is a unit test, and fails if it starts a process. Under pytest-xdist the tests of one module stay
on one worker, those of the real Slurm together, and the modules that take longest begin first.
"""

import subprocess
from collections.abc import Callable, Iterator
from functools import wraps
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

TIERS = {
    "slurm": "needs the real two-node Slurm of tests/slurm",
    "e2e": "starts commands and launchers as users do, or whole runs",
    "distributed": "starts processes that work together, or one that is killed",
    "unit": "starts no process; every test without another of these marks",
    "gpu": "needs a GPU; run by `pytest -m gpu` alone",
}
STARTS = pytest.StashKey[list[str]]()
UNDO = pytest.StashKey[pytest.MonkeyPatch]()


def tier_of(item: pytest.Item) -> str:
    """Return the tier of a test: the first that it is marked with."""
    return next((tier for tier in TIERS if item.get_closest_marker(tier)), "unit")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks, and note every process that this one starts."""
    for tier, meaning in TIERS.items():
        config.addinivalue_line("markers", f"{tier}: {meaning}")
    starts = config.stash[STARTS] = []
    patch = config.stash[UNDO] = pytest.MonkeyPatch()
    patch.setattr(subprocess.Popen, "__init__", _noted(subprocess.Popen.__init__, starts))
    patch.setattr(BaseProcess, "start", _noted(BaseProcess.start, starts))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[UNDO].undo()


def _noted(start: Callable[..., None], starts: list[str]) -> Callable[..., None]:
    @wraps(start)
    def noted(process: Any, *arguments: Any, **settings: Any) -> None:
        starts.append(str(arguments[0] if arguments else settings.get("args", process)))
        start(process, *arguments, **settings)

    return noted


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark unit tests; on a worker put the modules that take longest first."""
    for item in items:
        if tier_of(item) == "unit":
            item.add_marker("unit")
    if hasattr(config, "workerinput"):
        ranks: dict[str, tuple[bool, bool, int]] = {}
        for item in items:
            module = module_of(item.nodeid)
            ranks[module] = min(ranks.get(module, _rank(item)), _rank(item))
        items.sort(key=lambda item: ranks[module_of(item.nodeid)])


def _rank(item: pytest.Item) -> tuple[bool, bool, int]:
    """Return how late a test may begin: the cluster's first, then the slow ones, then by tier."""
    tier = tier_of(item)
    return tier != "slurm", item.get_closest_marker("slow") is None, list(TIERS).index(tier)


def module_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.config.stash[STARTS].clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[pytest.TestReport]:
    """Fail a unit test that has started a process."""
    report: pytest.TestReport = yield  # type: ignore[misc]
    starts = item.config.stash[STARTS]
    if report.when == "call" and report.passed and tier_of(item) == "unit" and starts:
        report.outcome = "failed"
        report.longrepr = f"a unit test starts no process, mark it distributed or e2e; this one started {starts}"
    return report


class ByModule(LoadScopeScheduling):
    """Gives each module to one worker, and the modules of tests/slurm, which share a cluster, to the same."""

    def _split_scope(self, nodeid: str) -> str:
        module = module_of(nodeid)
        return "tests/slurm" if module.startswith("tests/slurm/") else module


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByModule:
    return ByModule(config, log)
