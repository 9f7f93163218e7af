"""For all tests: how fast this machine is today decides nothing, and each has the markers by which suites choose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from demo.torch_release import compile_variables

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

for variable, value in compile_variables().items():
    os.environ.setdefault(variable, value)

TESTS = Path(__file__).parent
FOLDERS = {"unit": "unit", "contract": "unit", "softnpu": "softnpu", "e2e": "e2e", "faults": "faults"}
"""The marker of each folder, which no file has to repeat. Those of tests/hardware say themselves what they need."""
_TWO_NODES = "two_nodes"


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TESTS not in item.path.parents:
            continue  # vLLM's own, run by ci/upstream
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDERS:
            item.add_marker(FOLDERS[folder])
        if any(_TWO_NODES in name for name in (item.name, *getattr(item, "fixturenames", ()))):
            item.add_marker("multinode")
