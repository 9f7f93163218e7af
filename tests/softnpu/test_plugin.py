"""The plugin in real vLLM with real vllm-ascend: platform, executor, workers, and what is rejected."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from softnpu.activate import make_environment
from softnpu.cluster import namespaces

from tests.softnpu.plugin_script import MARKER
from tests.softnpu.processes import check_python
from vllm_ray_ascend import __version__

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "SOFTNPU_DEVICES": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
NPU = ["NPU", "ASCEND_RT_VISIBLE_DEVICES", ["RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"]]
BESIDE = {"class": "vllm_ascend.platform.NPUPlatform", "ours": __version__, "facts": NPU}
ALONE = {"class": "vllm_ray_ascend.platform.RayAscendPlatform", "ours": __version__, "facts": NPU}
OFF = {"class": "vllm_ascend.platform.NPUPlatform", "ours": None, "facts": NPU}
LIMIT_S = 400
OURS = "vllm_ray_ascend.executor.executor.RayAscendExecutor"
UPSTREAM = "vllm.v1.executor.ray_executor_v2.RayExecutorV2"


def start(case: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: os.environ[name] for name in os.environ if not name.startswith(("VLLM_", "ASCEND_RT"))}
    return subprocess.run(
        [sys.executable, "-m", "tests.softnpu.plugin_script", case, *arguments],
        env={**make_environment(inherited), **QUIET, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def answer(case: str, *arguments: str, **variables: str) -> tuple[Any, str]:
    done = start(case, *arguments, **variables)
    log = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    assert done.returncode == 0 and len(lines) == 1, log[-5000:]
    return json.loads(lines[0].removeprefix(MARKER)), log


@pytest.mark.parametrize(
    ("arguments", "variables", "platform", "executor"),
    [
        ([], {}, BESIDE, OURS),
        (["ours-first"], {"VLLM_RAY_ASCEND": "1"}, BESIDE, OURS),
        ([], {"VLLM_PLUGINS": "ray_ascend"}, ALONE, OURS),
        ([], {"VLLM_RAY_ASCEND": "0"}, OFF, UPSTREAM),
        ([], {"VLLM_PLUGINS": "ascend"}, OFF, UPSTREAM),
        ([], {"VLLM_RAY_ASCEND_EXECUTOR": "upstream"}, BESIDE, UPSTREAM),
    ],
    ids=["beside", "imported-first", "alone", "off", "not-named", "upstream"],
)
def test_platform_and_executor_of_a_process(
    arguments: list[str], variables: dict[str, str], platform: dict[str, Any], executor: str
) -> None:
    found, log = answer("process", *arguments, **variables)
    assert found == {"platform": platform, "executor": executor}
    assert "Unknown vLLM environment variable" not in log


def test_another_platform_is_left_alone() -> None:
    found, _ = answer("process", VLLM_TARGET_DEVICE="cpu")
    assert found["executor"] == UPSTREAM
    assert found["platform"]["ours"] is None and "CpuPlatform" in found["platform"]["class"]


def test_platforms_of_ray_actors() -> None:
    drivers = [{}, {"VLLM_PLUGINS": "ray_ascend"}, {"VLLM_RAY_ASCEND": "0"}]
    assert answer("actors", json.dumps(drivers))[0] == [BESIDE, ALONE, OFF]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"VLLM_RAY_ASCEND": "yes"}, "VLLM_RAY_ASCEND='yes' is not a value of this switch. Accepted: auto, 0, 1."),
        ({"VLLM_RAY_ASCEND": "1", "VLLM_TARGET_DEVICE": "cpu"}, "vLLM's platform is CpuPlatform"),
    ],
    ids=["bad-value", "other-platform"],
)
def test_a_switch_that_cannot_be_honoured_fails_the_start(variables: dict[str, str], said: str) -> None:
    done = start("process", **variables)
    assert done.returncode != 0 and said in done.stderr


def test_missing_ray_is_reported_with_the_remedy() -> None:
    found, _ = answer("config", "without-ray")
    assert "Failed to import Ray" in found["error"]
    assert "pip install ray" in found["error"]


def test_an_old_ray_is_reported_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "ray-2.40.0.dist-info").mkdir()
    (tmp_path / "ray-2.40.0.dist-info" / "METADATA").write_text("Name: ray\nVersion: 2.40.0\n")
    found, _ = answer("config", str(tmp_path))
    assert found["error"].startswith("RayVersionError: VRA-112: Ray 2.40.0 is too old, 2.48 is the oldest that works")


@pytest.fixture(scope="module")
def healthy() -> tuple[dict[str, Any], str]:
    return answer("engine")


def test_a_healthy_engine_logs_one_ready_line(healthy: tuple[dict[str, Any], str]) -> None:
    found, log = healthy
    places = ", ".join(f"rank {n} -> {re.escape(found['address'])} NPU {n} \\(physical {n}\\)" for n in (0, 1))
    versions = r"vLLM \S+, vllm-ascend \S+, Ray \S+, torch-npu \S+"
    line = rf"vllm-ray-ascend {__version__} ready: {versions}; 1 node, 2 NPUs; {places}"
    assert len(re.findall(line, log)) == 1, log[-3000:]
    assert len(re.findall("vllm-ray-ascend .* ready", log)) == 1


def test_executor_and_workers_are_ours_on_vllm_ascends_worker(healthy: tuple[dict[str, Any], str]) -> None:
    found, _ = healthy
    assert found["executor"] == "RayAscendExecutor"
    assert [worker["worker"] for worker in found["workers"]] == ["NPUWorker", "NPUWorker"]
    assert [worker["platform"] for worker in found["workers"]] == [BESIDE, BESIDE]


def test_collections_of_workers_skip_what_is_imported(healthy: tuple[dict[str, Any], str]) -> None:
    for worker in healthy[0]["workers"]:
        assert worker["gc"]["enabled"] and worker["gc"]["frozen"] > 100_000


@pytest.mark.parametrize(
    "module",
    ["vllm_ray_ascend.executor.worker", "vllm_ray_ascend.compiled_graph.worker", "vllm_ray_ascend.engine.actors"],
    ids=["worker", "worker-of-a-graph", "engine-core"],
)
def test_no_garbage_is_collected_while_a_process_of_an_engine_imports_vllm(module: str) -> None:
    """Ray unpickles a class by the name of its module, and has imported nothing of vLLM before."""
    found, _ = answer("imports", module)
    assert found == {"full_collections": 0, "enabled": True}


def test_ranks_are_what_the_workers_report(healthy: tuple[dict[str, Any], str]) -> None:
    found, _ = healthy
    workers = [[worker["device"], worker["pid"]] for worker in found["workers"]]
    assert [[visible, pid] for _, _, visible, _, pid in found["ranks"]] == workers
    assert {address for _, address, *_ in found["ranks"]} == {found["address"]}


def test_the_text_is_right(healthy: tuple[dict[str, Any], str]) -> None:
    assert "Beautiful is better than ugly." in healthy[0]["text"]


def test_variables_travel_or_stay_or_are_derived(healthy: tuple[dict[str, Any], str]) -> None:
    """The driver's address for HCCL holds on its own node; beside it no interface is derived. Others are derived.

    HCCL's limit of an operation is HCCL's: it holds for the start and for weight transfers, too.
    """
    found, _ = healthy
    for worker in found["workers"]:
        assert worker["variables"] == {
            "HCCL_IF_IP": "127.0.0.1",
            "HCCL_SOCKET_IFNAME": None,
            "HCCL_CONNECT_TIMEOUT": "321",
            "HCCL_EXEC_TIMEOUT": None,
            "SOFTNPU_STREAMS": None,
            "VLLM_HOST_IP": found["address"],
        }


def test_a_frameworks_classes_and_wrappers_run_below_ours() -> None:
    """As with vLLM's own executor: a subclass in the place of its worker or executor, wrapped startup and calls."""
    found, log = answer("framework")
    assert found["calls"] == ["subclass", "wrapper"]
    assert found["workers"] == 2 * [["late", ["early", "ran"]]]
    for methods in found["called"].values():
        assert {"get_kv_cache_spec", "execute_model", "sample_tokens", "_framework_facts"} <= set(methods)
    assert (found["executor"], found["reported"]) == ("RayAscendExecutor", 2)
    assert "Workers are RayAscendWorkerProc on top of __main__.framework.<locals>.Worker" in log
    assert "Beautiful is better than ugly." in found["text"]


def test_a_growing_cluster_is_waited_for() -> None:
    assert answer("growing")[0] == {"waits": True}


def test_more_npus_than_the_cluster_has_are_rejected_at_once() -> None:
    found, _ = answer("refused", "1", "2", "")
    assert found["error"].startswith(
        "ClusterResourceError: VRA-243: The engine needs 2 NPUs (--tensor-parallel-size 2)"
    )
    assert found["free"] == 1 and found["placements"] == []


def test_a_visible_list_with_an_npu_that_does_not_exist() -> None:
    found, log = answer("refused", "2", "2", "0,9")
    list_ = "ASCEND_RT_VISIBLE_DEVICES=0,9 names NPU '9', which does not exist"
    assert f"it declares 2 NPUs to Ray, but 1 of 2 are usable: {list_}" in found["error"]
    assert found["free"] == 2 and set(found["placements"]) <= {"REMOVED"}, log[-2000:]


SMALL_SHM = 'mount -t tmpfs -o size=900k tmpfs /dev/shm && exec "$@"'
"""As in a container without --shm-size, once others have filled what it has."""
START_IN_RAY = """
from types import SimpleNamespace
from vllm_ray_ascend.executor.executor import RayAscendExecutor
executor = RayAscendExecutor.__new__(RayAscendExecutor)
executor._own_group, executor.vllm_config = None, SimpleNamespace(parallel_config=None)
executor._initialize_ray_cluster(None)
"""


@pytest.mark.skipif(namespaces.missing_requirement() is not None, reason=str(namespaces.missing_requirement()))
def test_too_little_shared_memory_is_reported_before_ray_is_joined() -> None:
    """Else the process that writes the first messages ends by SIGBUS, without a word."""
    command = ["unshare", "--mount", "sh", "-c", SMALL_SHM, "sh", sys.executable, "-c", START_IN_RAY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode != 0
    assert "ClusterResourceError: VRA-359: /dev/shm has 1 MiB free of 1 MiB: " in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("share", ["0", *(pytest.param(each, marks=pytest.mark.slow) for each in ("2", "nan"))])
def test_a_share_that_no_worker_can_have_is_refused_before_ray_is_joined(share: str) -> None:
    environment = {**os.environ, "VLLM_RAY_PER_WORKER_GPUS": share}
    done = subprocess.run(
        [sys.executable, "-c", START_IN_RAY], capture_output=True, text=True, env=environment, timeout=LIMIT_S
    )
    assert done.returncode != 0
    assert f"PlacementError: VRA-287: VLLM_RAY_PER_WORKER_GPUS={share} is not what" in done.stderr, done.stderr[-3000:]


JOINS_AND_LEAVES = """
import os, subprocess, sys
import ray
from vllm_ray_ascend.compat.start_method import PARENT_CLUSTER, RAY_ADDRESS, force_spawn_after_ray_init
show = "import os; from vllm_ray_ascend.plugin import *; join_parent_cluster(); print(os.environ.get(RAY_ADDRESS))"
def address_of_child():
    return subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout.strip()
ray.init(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
force_spawn_after_ray_init()
assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn" and RAY_ADDRESS not in os.environ
assert address_of_child() == ray.get_runtime_context().gcs_address
os.environ[RAY_ADDRESS] = "10.0.0.1:6379"
assert address_of_child() == "10.0.0.1:6379"
ray.shutdown()
del os.environ["VLLM_WORKER_MULTIPROC_METHOD"]
force_spawn_after_ray_init()
assert PARENT_CLUSTER not in os.environ
assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"  # its threads are still there
"""


def test_children_join_the_cluster_that_their_parent_has_joined() -> None:
    """The parent's own next ray.init() is left alone."""
    check_python(JOINS_AND_LEAVES, RAY_ADDRESS=None)
