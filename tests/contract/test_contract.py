"""Every supported release of upstream still has what we rely on; read in its released source, nothing is installed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import pytest

from ci.contract.__main__ import supported
from ci.contract.facts import check, files
from ci.releases import Sources, fetch

pytestmark = pytest.mark.unit
_THREADS = 8
EVERY_TIME = ("2.10.0.post4", "2.13.0")
"""Releases of torch_npu that every run reads, 35 MB each: those that the tests run with."""


def is_slow(release: tuple[str, str]) -> bool:
    project, version = release
    return project == "torch-npu" and version not in EVERY_TIME


@pytest.fixture(scope="module")
def reading(request: pytest.FixtureRequest) -> dict[tuple[str, str], Future[Sources]]:
    """All releases that were chosen, being read at once: most of the time goes in waiting for the index."""
    pool = ThreadPoolExecutor(_THREADS)
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    chosen = [cast(tuple[str, str], test.callspec.params["release"]) for test in tests if test.module is request.module]
    return {(name, version): pool.submit(fetch, name, version, files(name)) for name, version in chosen}


@pytest.mark.parametrize(
    "release",
    [pytest.param(each, marks=[pytest.mark.slow] if is_slow(each) else [], id="-".join(each)) for each in supported()],
)
def test_upstream_is_what_we_rely_on(release: tuple[str, str], reading: dict[tuple[str, str], Future[Sources]]) -> None:
    broken = check(reading[release].result())
    assert not broken, f"{' '.join(release)} changed {len(broken)} facts:\n" + "\n".join(map(str, broken))
