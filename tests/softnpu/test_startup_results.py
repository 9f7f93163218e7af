"""Results of the ranks while an engine starts, as real Ray gives them: all that are ready at once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from vllm_ray_ascend.errors import WorkerFailedError
from vllm_ray_ascend.executor.startup import StartupRayProxy
from vllm_ray_ascend.executor.supervisor import WorkerSupervisor
from vllm_ray_ascend.settings import Settings

pytestmark = pytest.mark.integration

RANKS = 1024


class CountingRay:
    """Ray, and how many references were waited for in all."""

    waited_for = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    def wait(self, references: list[Any], **options: Any) -> Any:
        self.waited_for += len(references)
        return ray.wait(references, **options)


@pytest.fixture(scope="module")
def startup() -> Iterator[StartupRayProxy]:
    with tempfile.TemporaryDirectory(prefix="vra-", ignore_cleanup_errors=True) as folder:  # Ray wants a short path
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield StartupRayProxy(WorkerSupervisor(list, Settings(), 240.0), Settings())
        ray.shutdown()


def test_the_work_grows_with_the_number_of_ranks_and_not_with_its_square(startup: StartupRayProxy) -> None:
    startup._ray = counting = CountingRay()
    references = [ray.put(rank) for rank in range(RANKS)]
    assert startup._get_results(references, "model") == list(range(RANKS))
    assert counting.waited_for <= 8 * RANKS, "each reference is waited for in a few rounds, not in one for each rank"


def test_a_rank_that_fails_is_not_waited_for_until_the_others_are_ready(startup: StartupRayProxy) -> None:
    @ray.remote  # type: ignore[untyped-decorator]  # Ray is untyped
    def start(rank: int) -> int:
        if rank == 1:
            raise ValueError("no device")
        time.sleep(600)
        return rank

    references = [start.remote(rank) for rank in range(2)]
    with pytest.raises(WorkerFailedError, match=r"VRA-318: rank 1 failed .*\(model\)"):
        startup._get_results(references, "model")
    ray.cancel(references[0], force=True)
