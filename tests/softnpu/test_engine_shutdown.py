"""How long vLLM waits for an engine core's process: with vLLM's own manager of such processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import utils

from vllm_ray_ascend.control.timeouts import engine_exit_s, stop_grace_s
from vllm_ray_ascend.engine.shutdown import extend_shutdown_timeout

pytestmark = pytest.mark.integration

if not hasattr(utils, "get_engine_process_shutdown_timeout"):
    pytest.skip("this vLLM waits for a fixed time", allow_module_level=True)


def start_manager(ranks: int, shutdown_timeout: int = 0) -> Any:
    """Create vLLM's manager of no process at all, for an engine core of so many ranks."""
    parallel = SimpleNamespace(world_size=ranks, data_parallel_size=1, assigned_physical_gpu_ids=None)
    config: Any = SimpleNamespace(shutdown_timeout=shutdown_timeout, parallel_config=parallel)
    manager: Any = utils.CoreEngineProcManager
    return manager(0, 0, 0, vllm_config=config, local_client=True, handshake_address="", executor_class=None,
                   log_stats=False)  # fmt: skip


def test_the_time_of_an_engine_core_follows_the_number_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_STOP_GRACE_S", "5")
    extend_shutdown_timeout(utils)
    seconds = utils.get_engine_process_shutdown_timeout
    assert seconds(0, 0) == engine_exit_s(5, 1) == 17
    start_manager(2048).shutdown(0)
    assert seconds(0, 0) == engine_exit_s(5, 2048) == stop_grace_s(5, 2048) + 12
    start_manager(2)
    assert seconds(0, 0) == engine_exit_s(5, 2048), "of the largest"
    assert (seconds(30, 0), seconds(30, 12), seconds(0, 7)) == (0, 12, 7), "a limit of the user's own stays"
