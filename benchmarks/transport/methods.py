"""Every way to move a tensor from one actor's NPU to another's, each with a pair of actors of its own."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

from benchmarks.transport.actor import BenchmarkActor
from benchmarks.transport.options import HOPS, Case

_ASK_S = 300.0


class Method(ABC):
    """One way, open until the end of the run."""

    def __init__(self, case: Case, nodes: list[str]) -> None:
        """Start its actors, on the first and the last of ``nodes`` (Ray's ids)."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

        made = ray.remote(num_cpus=0, resources={"NPU": 1}, **self.actor_options())(self.actor_class())
        self._actors = [
            made.options(scheduling_strategy=OnNode(nodes[-1 if case.tcp and rank else 0], soft=False)).remote(rank)
            for rank in range(2)
        ]
        self.where = self._both("where")

    def actor_class(self) -> type[Any]:
        """Return the class of its actors."""
        return BenchmarkActor

    def actor_options(self) -> dict[str, Any]:
        """Return Ray's options of its actors."""
        return {}

    def open(self) -> None:  # noqa: B027  some have nothing to open
        """Make what lasts: groups, graphs."""

    @abstractmethod
    def hops(self, size: int, count: int) -> list[float]:
        """Return seconds of each of ``count`` hops of ``size`` bytes."""

    def _both(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of both actors at once."""
        import ray

        return list(ray.get([getattr(each, method).remote(*arguments) for each in self._actors], timeout=_ASK_S))


class Raw(Method):
    """torch.distributed.send and recv."""

    def open(self) -> None:
        """Make the group of the two."""
        import ray

        port = ray.get(self._actors[0].free_port.remote())
        self._both("open_raw", f"tcp://{self.where[0]['node']}:{port}")

    def hops(self, size: int, count: int) -> list[float]:
        """Measure by the first actor's clock."""
        return list(self._both("raw", size, count)[0])


class Group(Method):
    """Our Group, without Ray on the way."""

    def open(self) -> None:
        """Make the group of the two."""
        import ray

        self._both("open_group", ray.get(self._actors[0].root.remote()))

    def hops(self, size: int, count: int) -> list[float]:
        """Measure by the first actor's clock."""
        return list(self._both("group", size, count)[0])


class Graph(Method):
    """A compiled graph: to and fro, by the first actor's clock between the first step and the last."""

    transport: Any

    def open(self) -> None:
        """Compile."""
        from ray.dag import InputNode

        first, second = self._actors
        with InputNode() as size:
            node = self._hint(first.first_hop.bind(size))
            for number in range(1, HOPS):
                node = self._hint((second if number % 2 else first).relay.bind(node))
            node = first.last_hop.bind(node, HOPS)
        self._graph = node.experimental_compile()

    def _hint(self, node: Any) -> Any:
        return node.with_tensor_transport(self.transport)

    def hops(self, size: int, count: int) -> list[float]:
        """Return the mean of the hops of each execution."""
        import ray

        return [ray.get(self._graph.execute(size), timeout=_ASK_S) for _ in range(1 + count)][1:]


class GraphHost(Graph):
    """Through host memory, which is Ray's way for tensors of NPUs unless one does something about it."""

    transport = "shm"


class GraphHccl(Graph):
    """Over our HcclCommunicator."""

    transport = "accelerator"

    def open(self) -> None:
        """Open it with the NPU's accelerator context."""
        from vllm_ray_ascend.ray_transport import register

        register()
        super().open()


class GraphEmpty(Graph):
    """The same, but nothing is transferred."""

    def open(self) -> None:
        """Make the communicator."""
        from benchmarks.transport.empty import EmptyCommunicator
        from vllm_ray_ascend.ray_transport import register

        register()
        self.transport = EmptyCommunicator.from_actors(self._actors)
        super().open()


class Objects(Method):
    """An object of Ray, from the call that makes it to the end of the one that takes it, by the driver's clock."""

    def hops(self, size: int, count: int) -> list[float]:
        """Return one object after another."""
        import ray

        first, second = self._actors
        seconds = []
        for _ in range(1 + count):
            begin = time.perf_counter()
            ray.get(second.consume.remote(first.make_object.remote(size)), timeout=_ASK_S)
            seconds.append(time.perf_counter() - begin)
        ray.get([first.delete.remote(), second.delete.remote()])
        return seconds[1:]


class ObjectStore(Objects):
    """By host memory."""

    def actor_class(self) -> type[Any]:
        """Return the class of the actors, whose `make_object` returns the tensor."""

        class Host(BenchmarkActor):
            def make_object(self, size: int) -> Any:
                return self.make_host_object(size)

        return Host


class Direct(Objects):
    """Our direct transport."""

    def actor_class(self) -> type[Any]:
        """Return the class of the actors, whose `make_object` returns the tensor."""
        from vllm_ray_ascend.ray_transport.direct import register

        return _naming(register())


class DirectEmpty(Objects):
    """The same, but nothing is transferred."""

    def actor_class(self) -> type[Any]:
        """Return the class of the actors, whose `make_object` returns the tensor."""
        from benchmarks.transport.empty import register

        return _naming(register())


class RayAscend(Objects):
    """ray-ascend's transport, as its documentation has it."""

    def actor_class(self) -> type[Any]:
        """Return the class of the actors, whose `make_object` returns the tensor."""
        from ray_ascend import register_hccl_tensor_transport

        register_hccl_tensor_transport()
        return _naming("HCCL")

    def open(self) -> None:
        """Open the group of the two actors."""
        from ray.experimental.collective import create_collective_group

        self._both("register_ray_ascend")
        create_collective_group(self._actors, backend="HCCL")


def _naming(transport: str) -> type[Any]:
    import ray

    class Named(BenchmarkActor):
        @ray.method(tensor_transport=transport)  # type: ignore[untyped-decorator]
        def make_object(self, size: int) -> Any:
            return BenchmarkActor.make_object(self, size)

    return Named


WAYS: dict[str, type[Method]] = {
    "raw": Raw,
    "group": Group,
    "graph-hccl": GraphHccl,
    "graph-host": GraphHost,
    "direct": Direct,
    "ray-ascend": RayAscend,
    "object-store": ObjectStore,
    "graph-empty": GraphEmpty,
    "direct-empty": DirectEmpty,
}
