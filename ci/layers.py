"""The layers of vllm_ray_ascend/: what may import what. Pure data.

Read by tests/unit/test_layers.py, which holds the rules, and by ci/docs.py, which makes the table in
docs/architecture.md. A file imports from its own folder and from the layers below its own, from nothing else: not from
a neighbour in its layer, not under TYPE_CHECKING, not inside a function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

PACKAGE = "vllm_ray_ascend"
"""The plugin."""
EMULATOR = "softnpu"
"""The software NPU, a distribution of its own in softnpu/src: neither of the two imports the other."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer. ``members``: each folder or file of it, and what that is for."""

    purpose: str
    members: Mapping[str, str]


LAYERS: tuple[Layer, ...] = (
    Layer(
        "what everything uses",
        {
            "__init__": "the version",
            "errors": "exception classes; each message has a code (VRA-...)",
            "log": "one logger for the package",
        },
    ),
    Layer(
        "upstream's names",
        {"patches": "table of every upstream name that is replaced, wrapped or added to; the place that applies them"},
    ),
    Layer(
        "configuration and pure functions",
        {
            "settings": "every `VLLM_RAY_ASCEND_*` switch: type, default, meaning",
            "addresses": "addresses and names of nodes: one form for comparisons, resolution",
            "devices": "lists, numbers and ranges of NPUs; who owns which. Pure",
            "compat": "what differs between versions of vLLM, vllm-ascend and Ray; the import hook",
        },
    ),
    Layer(
        "what is reported",
        {"observability": "table of metrics with their values, events; prometheus_client and Ray's metrics"},
    ),
    Layer(
        "one node",
        {
            "environment": "scope of each variable (node or copied); derivation of HCCL's variables",
            "accelerators": "NPU and CUDA behind one base class; the only place that names `torch.npu`, `torch.cuda`",
            "ipc": "sockets, JSON lines, vLLM's message queue over shared memory and over TCP",
        },
    ),
    Layer(
        "building blocks",
        {
            "cluster": "Ray's nodes, NPUs and placement groups: collected, checked, planned",
            "control": "failure detection and orders: server, client, exit sentinels, health check, timeouts",
            "hccl": "HCCL through ctypes: communicator, stream, watchdog. Without Ray, without vLLM",
            "acl_graphs": "ACL graphs: capture, fallback, consensus of ranks, release",
        },
    ),
    Layer(
        "diagnosis",
        {"doctor": "`vllm-ray-ascend doctor`, and the checks before a start: facts of every node, judged, reported"},
    ),
    Layer(
        "elastic expert parallelism",
        {"elastic_ep": "an MoE engine changes its size while it serves: groups, layers, experts, a worker's steps"},
    ),
    Layer(
        "integration with vLLM and Ray",
        {
            "platform_patch": "members that are added to vllm-ascend's `NPUPlatform`",
            "engine": "engine cores: data parallel ranks as Ray actors, shutdown, recovery",
            "ray_transport": "tensors over HCCL between Ray actors: compiled graphs and direct transport",
        },
    ),
    Layer(
        "the executor",
        {
            "platform": "the platform class where `VLLM_PLUGINS` selects ours alone",
            "executor": "`RayAscendExecutor`: starts, supervises, restarts and stops the workers",
        },
    ),
    Layer(
        "the executor's variant",
        {"compiled_graph": "`CompiledGraphExecutor`: steps as a Ray compiled graph"},
    ),
    Layer("vLLM's entry points", {"plugin": "called by vLLM in every process; decides what is active"}),
    Layer("the command line", {"cli": "the command `vllm-ray-ascend`, one file for each subcommand"}),
)
"""From the lowest to the highest."""

LEVELS: Mapping[str, int] = {name: level for level, layer in enumerate(LAYERS) for name in layer.members}
"""Each folder's or file's layer, counted from the lowest."""

NEVER: tuple[tuple[str, str], ...] = (("ipc", "control"), ("hccl", "ray_transport"))
"""Imports that stay forbidden however the layers are arranged: sockets and queues know nothing of failure detection,
and the HCCL binding works without Ray."""

HEAVY = frozenset({"torch", "torch_npu", "ray", "vllm", "vllm_ascend"})
"""Packages that take seconds to import or may be missing: no file imports them at its top, but those of LATE."""

LATE: tuple[str, ...] = (
    "vllm_ray_ascend/compat/mooncake.py",
    "vllm_ray_ascend/compiled_graph/dag.py",
    "vllm_ray_ascend/compiled_graph/executor.py",
    "vllm_ray_ascend/compiled_graph/pp_communicator.py",
    "vllm_ray_ascend/compiled_graph/read_backoff.py",
    "vllm_ray_ascend/compiled_graph/worker.py",
    "vllm_ray_ascend/elastic_ep/experts.py",
    "vllm_ray_ascend/elastic_ep/groups.py",
    "vllm_ray_ascend/elastic_ep/layers.py",
    "vllm_ray_ascend/elastic_ep/rendezvous.py",
    "vllm_ray_ascend/elastic_ep/scaling.py",
    "vllm_ray_ascend/elastic_ep/worker.py",
    "vllm_ray_ascend/engine/actors.py",
    "vllm_ray_ascend/engine/elastic_client.py",
    "vllm_ray_ascend/engine/elastic_state.py",
    "vllm_ray_ascend/engine/manager.py",
    "vllm_ray_ascend/engine/rank_actors.py",
    "vllm_ray_ascend/engine/rank_client.py",
    "vllm_ray_ascend/engine/recovery.py",
    "vllm_ray_ascend/executor/",
    "vllm_ray_ascend/ipc/message_queue.py",
    "vllm_ray_ascend/platform.py",
    "vllm_ray_ascend/ray_transport/accelerator_context.py",
    "vllm_ray_ascend/ray_transport/communicator.py",
    "vllm_ray_ascend/ray_transport/direct/manager.py",
    "vllm_ray_ascend/ray_transport/direct/weight_transfer.py",
    "vllm_ray_ascend/ray_transport/registration.py",
    "softnpu/cluster/probe.py",
    "softnpu/ops/",
)
"""Files, and folders of files, that are imported only where vLLM, Ray or torch are in use already."""

ENTRIES = ("vllm_ray_ascend.plugin", "vllm_ray_ascend.cli.main", "softnpu.cli")
"""Modules that a process imports before it is known whether it needs any of HEAVY."""


def table_rows() -> list[list[str]]:
    """Rows of the table in docs/architecture.md: layer, member, purpose; the highest layer first."""
    return [
        [layer.purpose if position == 0 else "", f"`{name}`", purpose]
        for layer in reversed(LAYERS)
        for position, (name, purpose) in enumerate(layer.members.items())
        if name != "__init__"
    ]
