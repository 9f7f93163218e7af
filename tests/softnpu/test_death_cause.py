"""Why a worker died, as real Ray knows it."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile

from vllm_ray_ascend.executor.death_cause import (
    gcs_obstacle,
    head_lost_message,
    memory_monitor_message,
    reconnect_limit_s,
)

_SCRIPT = """
import sys
import time
import ray
from vllm_ray_ascend.executor.death_cause import ray_failure

@ray.remote(num_cpus=0)
class Worker:
    def run(self, error=""):
        if error:
            raise ValueError(error)
        time.sleep(600)

is_short = sys.argv[2] in ("monitor", "supervised")
limits = {"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 100} if is_short else {}
ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], _system_config=limits)
worker = Worker.remote()
if sys.argv[2] == "error":
    print("REASON", ray_failure(worker.run.remote("no memory"), 60.0))
elif sys.argv[2] == "supervised":
    import logging
    from types import SimpleNamespace
    from vllm_ray_ascend.control.server import PeerLost
    from vllm_ray_ascend.executor.supervisor import WorkerSupervisor
    from vllm_ray_ascend.settings import Settings
    logging.getLogger("vllm").addHandler(logging.StreamHandler(sys.stdout))
    handle = SimpleNamespace(rank=1, run_ref=worker.run.remote())
    supervisor = WorkerSupervisor(lambda: [handle], Settings(), 240.0)
    ray.wait([handle.run_ref], timeout=60.0)
    print("REASON", flush=True)
    supervisor._handle_lost_worker(PeerLost(1, 7, "node 10.0.0.2", ""))
    for thread in supervisor._background:
        thread.join()
else:
    reference = worker.run.remote()
    print("BEFORE", repr(ray_failure(reference)))
    if sys.argv[2] == "kill":
        ray.kill(worker)
    print("REASON", ray_failure(reference, 60.0))
"""
LIMIT_S = 180


def reason_of(how: str) -> tuple[str, str]:
    """Return the reason for the end of a worker of a Ray of its own, and the output before."""
    with tempfile.TemporaryDirectory(prefix="vra-", ignore_cleanup_errors=True) as folder:  # Ray wants a short path
        command = [sys.executable, "-c", _SCRIPT, folder, how]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout
    before, _, reason = output.partition("REASON")
    return reason.strip(), before


def test_the_memory_monitor_is_named() -> None:
    reason, _ = reason_of("monitor")
    assert re.match(
        r"Ray's memory monitor killed it: .*running low on memory.*threshold.*\. Give the node more", reason
    )
    assert "Object store" not in reason


def test_the_memory_monitor_is_named_in_the_engine_s_log() -> None:
    log, _ = reason_of("supervised")
    assert log.startswith("VRA-322: Worker process 7 of rank 1 (node 10.0.0.2) died.")
    assert "\nVRA-361: rank 1 died: Ray's memory monitor killed it: " in log


def test_a_process_that_was_killed_otherwise_has_no_reason() -> None:
    reason, before = reason_of("kill")
    assert "BEFORE ''" in before  # while it lives
    assert reason == ""


def test_an_error_of_the_worker_is_the_reason() -> None:
    assert reason_of("error")[0] == "ValueError: no memory"


def test_the_older_report_of_the_memory_monitor() -> None:
    text = (  # Ray 2.48
        "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.1, ID: ab) where the "
        "task (task ID: cd, name=run, pid=7, memory used=0.04GB) was running was 27.1GB / 28.0GB (0.97), which exceeds "
        "the memory usage threshold of 0.95. Ray killed this worker (ID: ef) because it was the most recently "
        "scheduled task; to see more information about memory usage on this node, use `ray logs raylet.out`."
    )
    message = memory_monitor_message(text)
    assert "27.1GB / 28.0GB (0.97)" in message
    assert "scheduled task. Give the node more memory" in message


def test_a_head_that_is_gone_is_named() -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        assert gcs_obstacle(address) is None
    obstacle = gcs_obstacle(address)
    assert obstacle == "Connection refused"
    assert head_lost_message(address, obstacle, 600.0, "Rank 1 died.").startswith(
        f"Ray's head (GCS) at {address} is gone (Connection refused): Ray ends all processes of its cluster 600 s "
    )


def test_ray_s_limit_for_a_head_that_is_gone() -> None:
    assert reconnect_limit_s({}) == 60
    assert reconnect_limit_s({"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}) == 600
    assert reconnect_limit_s({"RAY_gcs_rpc_server_reconnect_timeout_s": "ten"}) == 60
