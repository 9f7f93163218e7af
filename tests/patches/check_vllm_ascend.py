"""Checks of what patches/vllm-ascend fixes, run against the vllm-ascend on the path; one for each patch."""

from __future__ import annotations

import vllm.v1.engine.core
import vllm_ascend.patch.platform.patch_dp_device_ids as device_ids

from tests.patches.report import run
from tests.softnpu.test_pipeline_scheduling import create_scheduler, max_decodes_in_flight


def device_ids_in_the_engine_core() -> None:
    ours = device_ids._patched_get_physical_gpu_ids_for_local_dp_rank
    assert vllm.v1.engine.core.get_physical_gpu_ids_for_local_dp_rank is ours


def fence() -> None:
    with create_scheduler() as scheduler:
        assert max_decodes_in_flight(scheduler) == 1


if __name__ == "__main__":
    run({"vllm-ascend-0001": device_ids_in_the_engine_core, "vllm-ascend-0002": fence})
