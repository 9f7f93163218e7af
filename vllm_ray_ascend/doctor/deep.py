"""`doctor --deep`: HCCL between an NPU of each node and those of others. Ray assigns the NPUs, so busy ones stay so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_ray_ascend.cluster.placement_groups import current_nodes
from vllm_ray_ascend.cluster.resources import NodeResources
from vllm_ray_ascend.doctor.links import rounds
from vllm_ray_ascend.doctor.records import Link

CLAIM_LIMIT_S = 60.0
"""For Ray to start a process with an NPU on each node."""
PAIR_LIMIT_S = 120.0
"""For all transfers of one pair, communicator included."""
_MEBIBYTES = 16
_REPEATS = 5


class LinkTests(NamedTuple):
    """Results of the pairs, and addresses of nodes that had no free NPU."""

    links: list[Link]
    busy: list[str]


def run_link_tests(only: Sequence[str] = (), pair_limit_s: float = PAIR_LIMIT_S) -> LinkTests:
    """Test HCCL between the nodes of the joined cluster that have a free NPU, or those with the addresses ``only``."""
    import ray

    nodes = [node for node in current_nodes() if node.npus and (not only or node.address in only)]
    actors = {node.node_id: _claim(node) for node in nodes if node.free >= 1}
    links: list[Link] = []
    try:
        identities = _identities(actors)
        ready = [node for node in nodes if node.node_id in identities]
        for pairs in rounds(len(ready)):
            tested = _test_round([(ready[a], ready[b]) for a, b in pairs], actors, identities, pair_limit_s)
            links += tested
            # After an error of HCCL or the device a process is unusable: later pairs get new ones.
            failed = {address for link in tested if link.error for address in (link.first, link.second)}
            for node in ready:
                if node.address in failed:
                    ray.kill(actors[node.node_id])
                    actors[node.node_id] = _claim(node)
                    identities |= _identities({node.node_id: actors[node.node_id]})
    finally:
        for actor in actors.values():
            ray.kill(actor)
    return LinkTests(links, [node.address for node in nodes if node.node_id not in identities])


def _claim(node: NodeResources) -> Any:
    """Return an actor on the node, which exists once Ray has assigned it an NPU that nobody else has."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    options = {"num_cpus": 0, "resources": {"NPU": 1}, "max_restarts": 0, "scheduling_strategy": strategy}
    return ray.remote(LinkProbe).options(**options).remote(node.address)


def _identities(actors: Mapping[str, Any]) -> dict[str, int]:
    """Return the physical NPU of each actor that Ray has started within the limit, by node id."""
    import ray

    pending = {actor.physical_id.remote(): node_id for node_id, actor in actors.items()}
    ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=CLAIM_LIMIT_S) if pending else ([], [])
    return {pending[reference]: int(ray.get(reference)) for reference in ready}


def _test_round(
    pairs: Sequence[tuple[NodeResources, NodeResources]],
    actors: Mapping[str, Any],
    identities: Mapping[str, int],
    limit_s: float,
) -> list[Link]:
    """Test the pairs of a round simultaneously, none of which share a node."""
    import ray

    started = {}
    for first, second in pairs:
        a, b = actors[first.node_id], actors[second.node_id]
        root = a.root_info.remote()
        started[a.test.remote(0, root, limit_s), b.test.remote(1, root, limit_s)] = (first, second)
    ray.wait([each for both in started for each in both], num_returns=2 * len(started), timeout=limit_s)
    return [_link(first, second, identities, both) for both, (first, second) in started.items()]


def _link(first: NodeResources, second: NodeResources, identities: Mapping[str, int], both: Sequence[Any]) -> Link:
    import ray

    ends = first.address, identities[first.node_id], second.address, identities[second.node_id]
    try:
        times, _ = ray.get(list(both), timeout=1)
    except Exception as error:  # noqa: BLE001  HCCL's, Ray's of a dead or late process: each is the pair's result
        text = str(error).strip() or repr(error)
        return Link(*ends, error=text.splitlines()[-1].rstrip("."))
    return Link(
        *ends,
        connect_s=times["connect"],
        all_reduce_s=times["all_reduce"],
        send_s=times["send"],
        receive_s=times["receive"],
        memory_bytes=int(times["memory"]),
    )


class LinkProbe:
    """An actor with one NPU, which it opens in the first test."""

    def __init__(self, address: str) -> None:
        from vllm_ray_ascend.devices.kind import NPU
        from vllm_ray_ascend.environment.node import apply_network_settings

        apply_network_settings(address)
        self._physical_id = int(_assigned(NPU.key))

    def physical_id(self) -> int:
        """Return the NPU that Ray has assigned."""
        return self._physical_id

    def root_info(self) -> bytes:
        """Return what both ranks of a communicator need."""
        from vllm_ray_ascend.hccl.communicator import create_root_info

        return create_root_info(self._device())

    def test(self, rank: int, root_info: bytes, limit_s: float) -> dict[str, float]:
        """Return seconds of the communicator's start, an all-reduce and a transfer to the other rank, and bytes."""
        import torch

        from vllm_ray_ascend.accelerators.choose import get_accelerator
        from vllm_ray_ascend.hccl.communicator import Group

        device, accelerator = self._device(), get_accelerator("npu")
        accelerator.bind_thread(device)
        tensor = torch.ones(_MEBIBYTES << 18, dtype=torch.float32, device=accelerator.torch_device(device))
        result = torch.empty_like(tensor)
        free = accelerator.get_memory_info().free
        started = time.perf_counter()
        group = Group(device, rank, 2, root_info, limit_s).connect(("send", "all_reduce"), limit_s)
        try:
            times = {"connect": time.perf_counter() - started}
            times["all_reduce"] = _shortest(lambda: group.all_reduce(tensor, result).wait())
            if not bool((result == 2).all()):
                raise RuntimeError("the all-reduce of ones on two ranks is not 2 everywhere")
            acts = {
                "send": lambda: group.send(tensor, 1 - rank).wait(),
                "receive": lambda: group.recv(result, 1 - rank).wait(),
            }
            for name in ("send", "receive") if rank == 0 else ("receive", "send"):
                times[name] = _shortest(acts[name])
            if not bool((result == 1).all()):
                raise RuntimeError("what was received is not what was sent")
            return {**times, "memory": max(0, free - accelerator.get_memory_info().free)}
        finally:
            group.destroy()

    def _device(self) -> int:
        """Return the visible number of the NPU: 0 where Ray has hidden the others."""
        from vllm_ray_ascend.devices.numbering import physical_to_visible
        from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES, split_entries

        listed = split_entries(os.environ.get(VISIBLE_DEVICES))
        if listed is None:
            return self._physical_id
        return physical_to_visible([int(entry) for entry in listed], self._physical_id)


def _assigned(key: str) -> str:
    import ray

    (found,) = ray.get_runtime_context().get_accelerator_ids()[key]
    return str(found)


def _shortest(transfer: Callable[[], None]) -> float:
    """Return the seconds of the shortest of some transfers."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        transfer()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
