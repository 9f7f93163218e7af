"""Checks of what patches/ray fixes, run against the Ray on the path; one for each patch."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ray
from ray.dag.compiled_dag_node import CompiledDAG
from ray.experimental.channel.accelerator_context import AcceleratorContext, register_accelerator_context
from ray.experimental.channel.cpu_communicator import CPUCommunicator

from tests.patches.report import run

NOSET = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"


@ray.remote(num_cpus=0, resources={"NPU": 1})
class Holder:
    """Holds an NPU, with all of them visible, as vLLM's workers do."""

    def devices(self) -> list[int]:
        register_npu()
        return [device.index for device in AcceleratorContext.get().get_accelerator_devices()]


def register_npu() -> None:
    """Let this process's accelerator be an NPU. Only names are asked for, so that torch needs no more of it."""
    import torch

    torch.utils.rename_privateuse1_backend("npu")
    torch.npu = torch.cpu
    sys.modules.setdefault("torch.npu", torch.cpu)
    register_accelerator_context("npu", CPUCommunicator)


def auto_transport() -> None:
    register_npu()
    assert len(CompiledDAG._get_gpu_ids(holders[0])) == 1
    register_accelerator_context("xpu", CPUCommunicator)  # whose resource Ray calls GPU
    xpu: Any = Holder.options(num_gpus=1, resources={}).remote()  # type: ignore[attr-defined]
    assert len(CompiledDAG._get_gpu_ids(xpu)) == 1


def devices() -> None:
    assert sorted(index for indices in ray.get([each.devices.remote() for each in holders]) for index in indices) == [
        0,
        1,
    ]


def detection() -> None:
    from ray._private import accelerators
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    # CANN's Python module, by which Ray counts NPUs: eight of them.
    modules: dict[str, Any] = sys.modules
    modules["acl"] = SimpleNamespace(rt=SimpleNamespace(get_device_count=lambda: (8, 0)))
    # Ray asks them in the order of a set, which differs from process to process: here the one that hides comes first.
    every: Any = accelerators.get_all_accelerator_resource_names()
    accelerators.get_all_accelerator_resource_names = lambda: sorted(every, key=lambda name: name == "NPU")
    find: Any = ResourceAndLabelSpec._get_current_node_accelerator
    manager, count = find(8, {})
    assert manager.get_resource_name() == "NPU" and count == 8, f"found {manager.get_resource_name(), count}"
    manager, count = find(None, {"TPU": 4})
    assert (manager.get_resource_name(), count) == ("NPU", 8), f"found {manager.get_resource_name(), count}"
    del modules["acl"]
    manager, count = find(8, {})
    assert (manager.get_resource_name(), count) == ("GPU", 8), "what was declared still counts where nothing is found"


def ray_llm() -> None:
    from ray.llm._internal.serve.core.configs import accelerators

    found = accelerators.infer_hardware_kind_from_bundles({"bundle_per_worker": {"CPU": 1, "NPU": 1}})
    assert found == "npu", f"kind of bundles with NPUs: {found}"
    assert accelerators.infer_hardware_kind_from_bundles({"bundles": [{"GPU": 1}, {"NPU": 1}]}) == "gpu"
    npus: Any = accelerators.NPUAccelerator()
    assert npus.default_bundles(num_devices=2) == [{"NPU": 1}, {"NPU": 1}]
    assert npus.get_remote_options("Ascend910B3") == {
        "resources": {"NPU": 0.001},
        "accelerator_type": "Ascend910B3",
    }


def dashboard() -> None:
    load_dcmi()
    from ray.dashboard.modules.reporter.gpu_providers import GpuMetricProvider

    found = GpuMetricProvider().get_gpu_usage()
    assert len(found) == 3, f"NPUs in the dashboard: {found}"
    assert [each["index"] for each in found] == [0, 1, 2], "a card with two dies, and one with one"
    last = dict(found[-1])
    assert last.pop("uuid") == "00000001-00000000-00000002-00000003-00000004"
    process = {"pid": 4713, "gpu_memory_usage": 512, "gpu_utilization": None}
    assert last == {
        "index": 2,
        "name": "Ascend 910B3",
        "utilization_gpu": 42,
        "memory_used": 1024,
        "memory_total": 65536,
        "processes_pids": {4713: process},
        "power_mw": 93500,
        "temperature_c": 39,
    }


def load_dcmi() -> None:
    """Build the library of the driver's management interface, and load it under its name."""
    library = Path.cwd() / "libdcmi.so"
    source = Path(__file__).with_name("dcmi.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libdcmi.so", "-o", library, source], check=True)
    ctypes.CDLL(str(library))


_DASHBOARDS = (
    "aiohttp_cors",
    "opencensus",
    "opentelemetry",
    "opentelemetry.exporter",
    "opentelemetry.exporter.prometheus",
    "opentelemetry.proto",
)
"""What the dashboard's modules import beside Ray, in `ray[default]`, and the listing of events does not use."""


def do_without_extras() -> None:
    for name in _DASHBOARDS:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)


def event_list() -> None:
    do_without_extras()
    from ray.dashboard.modules.event.event_head import _list_cluster_events_impl
    from ray.util.state.common import ListApiOptions

    found = {
        name: {"event_id": name, "timestamp": time, "severity": "INFO", "source_type": "JOBS", "message": name}
        for name, time in {"of C++": 20, "of Python": "3"}.items()
    }
    with ThreadPoolExecutor(1) as executor:
        listed = asyncio.run(
            _list_cluster_events_impl(all_events={"": found}, executor=executor, option=ListApiOptions())
        )
    assert [event["message"] for event in listed.result] == ["of Python", "of C++"], "by their time"


if __name__ == "__main__":
    ray.init(
        address="local",
        num_cpus=1,
        num_gpus=1,
        resources={"NPU": 2},
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        runtime_env={"env_vars": {NOSET: "1"}},
        log_to_driver=False,
    )
    holder: Any = Holder
    holders = [holder.remote() for _ in range(2)]
    run(
        {
            "ray-0001": auto_transport,
            "ray-0002": devices,
            "ray-0003": detection,
            "ray-0004": ray_llm,
            "ray-0005": dashboard,
            "ray-0006": event_list,
        }
    )
    ray.shutdown()
