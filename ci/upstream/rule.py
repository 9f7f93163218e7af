"""pytest plugin: the rule of a table. What it leaves out does not run; a test that skips itself without a line fails.

Nothing of the tests themselves is changed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ci.upstream.table import parse

_counts: dict[str, Counter[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--counts", type=Path, help="file for the number of tests by file and outcome, as JSON")
    parser.addoption("--table", type=Path, required=True, help="table of what does not run")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the table; a line that matches no test fails the run, since it is obsolete."""
    table: Path = config.getoption("--table")
    files = {item.nodeid.partition("::")[0] for item in items}
    entries = parse(table.read_text()).excluded_in(files)
    leaving = {item.nodeid: entry for item in items for entry in entries if entry.matches(item.nodeid)}
    stale = [entry.pattern for entry in entries if entry not in leaving.values()]
    if stale:
        raise pytest.UsageError(f"no such test in this release, take it out of {table}: " + ", ".join(stale))
    for node_id in leaving:
        _count(config, node_id, "left out")
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in leaving])
    items[:] = [item for item in items if item.nodeid not in leaving]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Make a test fail that skips itself without a line in the table."""
    outcome: Any = yield
    report: pytest.TestReport = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, but not in {item.config.getoption('--table').name}: {reason}"
    if report.failed:
        _count(item.config, item.nodeid, "failed")
    elif report.when == "call":
        _count(item.config, item.nodeid, "passed")


def _count(config: pytest.Config, node_id: str, outcome: str) -> None:
    """Write the counts after each test: a test that hangs is ended together with this process."""
    _counts.setdefault(node_id.partition("::")[0], Counter())[outcome] += 1
    if path := config.getoption("--counts"):
        path.write_text(json.dumps(_counts))
