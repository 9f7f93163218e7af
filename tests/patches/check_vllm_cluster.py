"""Checks of what patches/vllm fixes and needs a Ray cluster, run against the vLLM on the path; one for each patch."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tests.patches.report import run

MASTER, OTHER = "127.0.0.2", "127.0.0.3"
"""Not 127.0.0.1: where Ray is to join that, it joins the machine's other address, where this head does not listen."""
WORKER_S = 120
modules: dict[str, Any] = sys.modules


def scale_up() -> None:
    from vllm.v1.engine.utils import CoreEngineActorManager

    nodes = [SimpleNamespace(node_ip=node["NodeManagerAddress"], node_id=node["NodeID"]) for node in ray.nodes()]
    # The state API asks Ray's dashboard, which is an extra of Ray's; its control store says the same.
    modules["ray.util.state"] = SimpleNamespace(list_nodes=lambda: nodes)
    old = SimpleNamespace(data_parallel_size=1, data_parallel_master_ip=MASTER, world_size=1)
    groups, _ = CoreEngineActorManager.add_dp_placement_groups(SimpleNamespace(parallel_config=old), 2)
    (group,) = groups
    assert f"node:{OTHER}" in group.bundle_specs[0], group.bundle_specs


def end_of_workers() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerHandle, RayWorkerProc

    parent: Any = RayWorkerProc

    class Worker(parent):  # type: ignore[misc]
        """vLLM's worker without a model: its loop and its end are upstream's."""

        def __init__(self, handle: Any, ended: str) -> None:
            self.ended = Path(ended)
            self.rank = 0
            self.worker = SimpleNamespace()
            self.rpc_broadcast_mq = MessageQueue.create_from_handle(handle, 0)
            self.worker_response_mq = SimpleNamespace(wait_until_ready=lambda: None)

        def shutdown(self) -> None:
            self.ended.write_text("in order")

    with tempfile.TemporaryDirectory() as folder:
        ended = Path(folder) / "ended"
        executor = RayExecutorV2.__new__(RayExecutorV2)
        executor.is_failed, executor.shutting_down, executor.shutdown_lock = False, False, contextlib.nullcontext()
        executor.rpc_broadcast_mq, executor.response_mqs = MessageQueue(1, 1), []
        actor = ray.remote(Worker).options(num_cpus=0).remote(executor.rpc_broadcast_mq.export_handle(), str(ended))
        ray.get(actor.__ray_ready__.remote(), timeout=WORKER_S)
        handle = RayWorkerHandle(actor=actor, rank=0, local_rank=0, node_id="")
        handle.run()
        executor.ray_worker_handles = [handle]
        executor.rpc_broadcast_mq.wait_until_ready()
        executor.shutdown()
        assert ended.exists(), "the worker was killed in its loop"


def new_engines() -> None:
    """Scale up by an engine on the master's node, beside one on another node that runs."""
    from vllm.v1.engine import core
    from vllm.v1.engine.utils import CoreEngineActorManager

    class Engine:
        """An engine core that does nothing."""

        def __init__(self, **options: Any) -> None:
            pass

        def wait_for_init(self) -> None:
            pass

        def run(self) -> None:
            time.sleep(10 * WORKER_S)

    modules[core.__name__].EngineCoreActor = Engine
    running = ray.remote(Engine).options(num_cpus=0).remote()
    runs = running.run.remote()
    bundles = [{f"node:{MASTER}": 0.001}, {f"node:{MASTER}": 0.001}]
    group = ray.util.placement_group(bundles)
    parallel = SimpleNamespace(
        world_size=1, data_parallel_master_ip=MASTER, data_parallel_size_local=0, eplb_config=SimpleNamespace()
    )
    config = SimpleNamespace(
        parallel_config=parallel, model_config=SimpleNamespace(is_moe=False), instance_id="e", kv_transfer_config=None
    )
    manager = SimpleNamespace(
        local_engine_actors=[],
        remote_engine_actors=[running],
        add_dp_placement_groups=lambda *_: ([group], [0]),
        env_vars_dict={},
        executor_class=None,
        log_stats=False,
        addresses=None,
        created_placement_groups=[None],
        placement_group_is_local=[False],
        run_refs=[runs],
        actor_run_ref_dict={running: runs},
    )
    scaling = threading.Thread(
        target=CoreEngineActorManager.scale_up_elastic_ep, args=(manager, config, 2, 0), daemon=True
    )
    scaling.start()
    scaling.join(WORKER_S)
    for actor in (*manager.local_engine_actors, running):
        ray.kill(actor)
    assert not scaling.is_alive(), "it waits for an engine that runs"
    assert len(manager.run_refs) == 2


def spawn() -> None:
    from vllm.utils.system_utils import get_mp_context

    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    assert get_mp_context().get_start_method() == "spawn"


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Two nodes of Ray, of which the second has an NPU, joined."""
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    # Ray would find the software NPUs by itself.
    head = {**small, "resources": {"NPU": 0}, "node_ip_address": MASTER}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.add_node(**small, resources={"NPU": 1}, node_ip_address=OTHER)
        ray.init(made.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        made.shutdown()


if __name__ == "__main__":
    with cluster():
        run({"vllm-0004": scale_up, "vllm-0005": end_of_workers, "vllm-0008": spawn, "vllm-0009": new_engines})
