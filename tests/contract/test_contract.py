"""Every supported release of upstream still has what we rely on; read in its released source, nothing is installed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ci.contract.__main__ import supported
from ci.contract.facts import check, files
from ci.releases import Sources, fetch

pytestmark = pytest.mark.unit
_THREADS = 8


@pytest.fixture(scope="module")
def reading() -> dict[tuple[str, str], Future[Sources]]:
    """All releases, being read at once: most of the time goes in waiting for the index."""
    pool = ThreadPoolExecutor(_THREADS)
    return {release: pool.submit(fetch, *release, files(release[0])) for release in supported()}


@pytest.mark.parametrize("release", supported(), ids="-".join)
def test_upstream_is_what_we_rely_on(release: tuple[str, str], reading: dict[tuple[str, str], Future[Sources]]) -> None:
    broken = check(reading[release].result())
    assert not broken, f"{' '.join(release)} changed {len(broken)} facts:\n" + "\n".join(map(str, broken))
