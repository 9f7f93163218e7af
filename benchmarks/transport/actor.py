"""One of the two actors between which a way sends: it has an NPU, and takes the times of what needs no driver."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

DTYPE = "float16"
_WIDTH = 2
_WARM_UPS = 2


class BenchmarkActor:
    """A Ray actor. Rank 0 begins each exchange, and its clock is the one that counts."""

    def __init__(self, rank: int) -> None:
        import ray
        import torch
        import torch_npu  # noqa: F401

        from vllm_ray_ascend.environment.node import apply_network_settings

        apply_network_settings(ray.util.get_node_ip_address(), groups=(("HCCL_IF_IP", "HCCL_SOCKET_IFNAME"),))
        self._torch: Any = torch
        self._rank = rank
        self._kept: dict[int, Any] = {}
        self._group: Any = None
        self._started = 0.0
        self._hops: list[float] = []
        torch.npu.set_device(0)

    def where(self) -> dict[str, Any]:
        """Return node, visible list and process, for the record."""
        import ray

        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        return {"node": ray.util.get_node_ip_address(), "visible": visible, "pid": os.getpid()}

    def free_port(self) -> int:
        """Return a port of this node for torch's store."""
        with socket.create_server(("", 0)) as server:
            return int(server.getsockname()[1])

    # ---- torch.distributed, and our Group: a message to and fro

    def open_raw(self, address: str) -> None:
        """Join torch.distributed's HCCL group of the two."""
        self._torch.distributed.init_process_group("hccl", init_method=address, rank=self._rank, world_size=2)

    def root(self) -> bytes:
        """Return the root information of HcclGetRootInfo."""
        from vllm_ray_ascend.hccl.communicator import create_root_info

        return create_root_info(0)

    def open_group(self, root: bytes) -> None:
        """Make a Group of the two."""
        from vllm_ray_ascend.hccl.communicator import Group

        self._group = Group(0, self._rank, 2, root)

    def raw(self, size: int, count: int) -> list[float]:
        """Return seconds a hop by torch.distributed."""
        distributed, stream = self._torch.distributed, self._torch.npu.current_stream()

        def send(tensor: Any) -> None:
            distributed.send(tensor, 1 - self._rank)

        def receive(tensor: Any) -> None:
            distributed.recv(tensor, 1 - self._rank)
            stream.synchronize()

        return self._to_and_fro(send, receive, size, count)

    def group(self, size: int, count: int) -> list[float]:
        """Return seconds a hop by our Group."""
        peer = 1 - self._rank

        def receive(tensor: Any) -> None:
            self._group.recv(tensor, peer).wait()

        return self._to_and_fro(lambda tensor: self._group.send(tensor, peer), receive, size, count)

    def _to_and_fro(
        self, send: Callable[[Any], None], receive: Callable[[Any], None], size: int, count: int
    ) -> list[float]:
        mine, theirs = self.tensor(size), self._torch.empty_like(self.tensor(size))
        hops = []
        for number in range(_WARM_UPS + count):
            begin = time.perf_counter()
            for step in (send, receive) if self._rank == 0 else (receive, send):
                step(mine if step is send else theirs)
            if number >= _WARM_UPS:
                hops.append((time.perf_counter() - begin) / 2)
        self._torch.npu.synchronize()
        self.delete()
        return hops

    # ---- compiled graphs: a tensor to and fro

    def first_hop(self, size: int) -> Any:
        """Return the tensor of the first hop."""
        tensor = self.tensor(size)
        self._started = time.perf_counter()
        return tensor

    def relay(self, tensor: Any) -> Any:
        """Return the tensor of an intermediate hop."""
        assert tensor.device.type == "npu", tensor.device
        return tensor

    def last_hop(self, tensor: Any, hops: int) -> float:
        """Receive the tensor of the last hop; returns the seconds of one hop."""
        return (time.perf_counter() - self._started) / hops

    # ---- objects of Ray

    def make_object(self, size: int) -> Any:
        """Return a tensor as the result of a call."""
        return self.tensor(size)

    def make_host_object(self, size: int) -> Any:
        """Return the same through host memory, as one has it without a transport."""
        return self.tensor(size).cpu()

    def consume(self, tensor: Any) -> int:
        """Return a tensor as the argument of a call, on this actor's NPU when it returns."""
        tensor = tensor.npu()
        self._torch.npu.synchronize()
        return int(tensor.numel())

    def register_ray_ascend(self) -> None:
        """Register what ray-ascend needs in every actor."""
        from ray_ascend import register_hccl_collective_backend

        register_hccl_collective_backend()

    def tensor(self, size: int) -> Any:
        """Return the tensor of ``size`` bytes, always the same."""
        if size not in self._kept:
            self._kept[size] = self._torch.zeros(size // _WIDTH, dtype=getattr(self._torch, DTYPE), device="npu")
        return self._kept[size]

    def delete(self) -> None:
        """Give memory back before the next size."""
        self._kept.clear()
        self._torch.npu.empty_cache()
