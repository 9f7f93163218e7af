"""Tests of the software NPU. They run on it: pytest itself is started by `softnpu exec`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

COMMAND = ".venv/bin/softnpu exec -- .venv/bin/python -m pytest tests/softnpu"

if "SOFTNPU_LIB" not in os.environ:
    raise pytest.UsageError(f"The tests of the software NPU run on it. Start them with: {COMMAND}")

# A node of their own: what other processes hold of this machine's software NPUs does not count here. Read once, at the
# first call of the runtime, so they are set before any test module is imported.
os.environ["SOFTNPU_NODE"] = f"pytest-{os.getpid()}"
os.environ["SOFTNPU_STATE_DIR"] = tempfile.mkdtemp(prefix="softnpu-tests-")
os.environ.setdefault("SOFTNPU_WAIT_LIMIT", "30")  # a wait that a fault leaves open ends the test, not the session
os.environ.setdefault("SOFTNPU_LOG", "0")  # failures that tests ask for need no line in the log


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["SOFTNPU_STATE_DIR"], ignore_errors=True)


_OF_A_DRIVER = ("HCCL_", "GLOO_", "RAY_", "VLLM_HOST_IP")


@pytest.fixture(autouse=True, scope="module")
def variables_of_this_module() -> Iterator[None]:
    """Restore the variables that Ray and the transports set in a driver, here pytest, after each module."""
    before = {name: value for name, value in os.environ.items() if name.startswith(_OF_A_DRIVER)}
    yield
    for name in [name for name in os.environ if name.startswith(_OF_A_DRIVER)]:
        del os.environ[name]
    os.environ.update(before)
