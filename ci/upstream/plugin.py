"""pytest plugin for vLLM's tests: our classes under vLLM's names, NPUs where a test says GPU, and the table's rule.

Nothing of the tests themselves is changed. With VLLM_RAY_ASCEND_EXECUTOR=upstream vLLM's own classes stay, on the same
NPUs: what fails then as well is not ours.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ci.upstream.table import TABLE, parse
from vllm_ray_ascend.settings import load

_counts: dict[str, Counter[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--counts", help="file for the number of tests by file and outcome, as JSON")


def pytest_configure() -> None:
    """Bind the names before any test module is imported, since those import them."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    _replace_gpu_with_npu_resources()
    if load().executor == "ours":
        _bind_ours()


def _bind_ours() -> None:
    """Bind the names that our plugin replaces only inside of its own code; it binds the executor's name itself."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.v1.executor import ray_executor_v2

    from vllm_ray_ascend.executor.executor import RayAscendExecutor
    from vllm_ray_ascend.executor.worker import RayAscendWorkerProc
    from vllm_ray_ascend.ipc.message_queue import CancellableQueue

    if ray_executor_v2.RayExecutorV2 is not RayAscendExecutor:
        raise pytest.UsageError("RayExecutorV2 is not ours: is VLLM_RAY_ASCEND=0 or VLLM_PLUGINS set?")
    ray_executor_v2.RayWorkerProc = RayAscendWorkerProc
    shm_broadcast.MessageQueue = CancellableQueue


def _replace_gpu_with_npu_resources() -> None:
    """Let a placement group's ``{"GPU": 1}``, written out in the tests, mean the resource of the platform."""
    import ray
    from vllm.platforms import current_platform

    make = ray.util.placement_group

    @functools.wraps(make)
    def placement_group(bundles: list[dict[str, float]], *args: Any, **kwargs: Any) -> Any:
        names = {"GPU": current_platform.ray_device_key}
        return make([{names.get(name, name): n for name, n in b.items()} for b in bundles], *args, **kwargs)

    ray.util.placement_group = placement_group


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the table; a line that matches no test fails the run, since it is obsolete."""
    _wait_for_the_end(items)
    files = {item.nodeid.partition("::")[0] for item in items}
    entries = parse(TABLE.read_text()).excluded_in(files)
    leaving = {item.nodeid: entry for item in items for entry in entries if entry.matches(item.nodeid)}
    stale = [entry.pattern for entry in entries if entry not in leaving.values()]
    if stale:
        raise pytest.UsageError(f"no such test in this vLLM, take it out of {TABLE}: " + ", ".join(stale))
    for node_id in leaving:
        _count(config, node_id, "left out")
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in leaving])
    items[:] = [item for item in items if item.nodeid not in leaving]


def _wait_for_the_end(items: list[pytest.Item]) -> None:
    """Let no test of the queue pass because its processes were killed after 60 s, as `distributed_run` does
    silently. One that hangs runs into the limit of its group."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        if run := getattr(module, "distributed_run", None):
            run.__defaults__ = (float("inf"),)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Make a test fail that skips itself without a line in the table."""
    outcome: Any = yield
    report: pytest.TestReport = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, but not in {TABLE.name}: {reason}"
    if report.failed:
        _count(item.config, item.nodeid, "failed")
    elif report.when == "call":
        _count(item.config, item.nodeid, "passed")


def _count(config: pytest.Config, node_id: str, outcome: str) -> None:
    """Write the counts after each test: a test that hangs is ended together with this process."""
    _counts.setdefault(node_id.partition("::")[0], Counter())[outcome] += 1
    if path := config.getoption("--counts"):
        Path(path).write_text(json.dumps(_counts))
