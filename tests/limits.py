"""Fails a test that takes long without saying why."""

from collections.abc import Iterator

import pytest

SECONDS = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "slow_seconds", "a test that takes longer needs the mark `slow`; 0: any may", type="string", default="0"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow(why): may take longer than `slow_seconds`, for this reason")
    config.stash[SECONDS] = float(config.getini("slow_seconds"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Fail a test whose preparation and call take longer than `slow_seconds` without a mark that says why."""
    report: pytest.TestReport = yield  # type: ignore[misc]
    taken = item.stash[SECONDS] = item.stash.get(SECONDS, 0.0) + call.duration
    limit, mark = item.config.stash[SECONDS], item.get_closest_marker("slow")
    if mark is not None and not (mark.args and isinstance(mark.args[0], str)):
        report.outcome, report.longrepr = "failed", "the mark `slow` says why: @pytest.mark.slow('...')"
    elif report.when == "call" and report.passed and mark is None and 0 < limit < taken:
        report.outcome = "failed"
        report.longrepr = f"took {taken:.0f} s, more than slow_seconds={limit:g}: make it faster or mark it slow('why')"
    return report
