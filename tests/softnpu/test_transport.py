"""NPU tensors in Ray's compiled graphs: real actors of one node, the real torch_npu, software NPUs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from ray.dag import DAGContext, InputNode, MultiOutputNode
from ray.experimental.collective import allgather, allreduce, reducescatter

from tests.softnpu.stage import Stage, expected
from vllm_ray_ascend import ray_transport

LIMIT = 60
VARIABLES = {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1", "SOFTNPU_WAIT_LIMIT": "120"}
SHORT_LIMIT = "6"  # seconds, in actors whose transfers are to be late


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """All NPUs are visible to every actor, and the list of them is not set, where Ray's own look-up fails."""
    ray_transport.register()
    ray.init("local", num_cpus=8, resources={"NPU": 6}, runtime_env={"env_vars": VARIABLES}, include_dashboard=False)
    context = DAGContext.get_current()
    context.get_timeout = context.submit_timeout = LIMIT
    yield
    ray.shutdown()


def new_stage(**options: Any) -> Any:
    return ray.remote(resources={"NPU": 1}, num_cpus=0, **options)(Stage).remote()


@contextmanager
def new_pair(first: dict[str, Any], second: dict[str, Any]) -> Iterator[list[Any]]:
    """Two actors with these options, whose NPUs are free afterwards."""
    pair = [new_stage(**first), new_stage(**second)]
    try:
        yield pair
    finally:
        for actor in pair:
            ray.kill(actor)


@pytest.fixture(scope="module")
def stages(cluster: None) -> list[Any]:
    return [new_stage() for _ in range(4)]


@pytest.fixture(scope="module")
def devices(stages: list[Any]) -> list[str]:
    ray_transport.register()
    with compiled(chain(stages)) as graph:
        ray.get(graph.execute(1), timeout=LIMIT)
    found = [about["device"] for about in ray.get([stage.about.remote() for stage in stages])]
    assert len(set(found)) == 4 and all(device.startswith("npu:") for device in found)
    return found


@contextmanager
def compiled(dag: Any, **options: Any) -> Iterator[Any]:
    graph = dag.experimental_compile(**options)
    try:
        yield graph
    finally:
        graph.teardown()


def chain(stages: list[Any], transport: Any = "hccl") -> Any:
    with InputNode() as given:
        value = stages[0].make.bind(given).with_tensor_transport(transport)
        for stage in stages[1:-1]:
            value = stage.forward.bind(value).with_tensor_transport(transport)
        return stages[-1].digest_all.bind(value)


def copies(stages: list[Any]) -> list[int]:
    return [about["copies"] for about in ray.get([stage.about.remote() for stage in stages])]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_values_of_any_shape_are_sent_from_npu_to_npu(count: int, stages: list[Any], devices: list[str]) -> None:
    before = copies(stages)
    with compiled(chain(stages[:count])) as graph:
        for seed in range(12):
            assert ray.get(graph.execute(seed), timeout=LIMIT) == (seed, expected(seed, devices[count - 1]))
    assert copies(stages) == before, "through host memory"


def test_auto_means_hccl_between_npus(stages: list[Any], devices: list[str]) -> None:
    before = copies(stages)
    with compiled(chain(stages[:2], "auto")) as graph:
        assert ray.get(graph.execute(3), timeout=LIMIT) == (3, expected(3, devices[1]))
    assert copies(stages) == before


def test_host_copies_are_counted(stages: list[Any], devices: list[str]) -> None:
    before = ray.get(stages[0].about.remote())
    with compiled(chain(stages[:2], "shm")) as graph:
        assert [d.checksum for d in ray.get(graph.execute(3), timeout=LIMIT)[1]] == [
            d.checksum for d in expected(3, devices[1])
        ]
    after = ray.get(stages[0].about.remote())
    assert after["copies"] > before["copies"] and after["copied"] > before["copied"]


@pytest.mark.parametrize("static", [False, True])
def test_direct_return_and_static_shapes(static: bool) -> None:
    """With actors of its own: a reader of static shapes waits in HCCL when its graph ends, and is unusable then."""
    options = {"_direct_return": True} | ({"_static_shape": True} if static else {})
    with new_pair({}, {}) as pair:
        with InputNode() as given:
            dag = pair[1].read_values.bind(pair[0].counted.bind(given).with_tensor_transport("hccl", **options))
        with compiled(dag) as graph:
            own = ray.get(pair[1].about.remote())["device"]
            for seed in range(3):
                assert ray.get(graph.execute(seed), timeout=LIMIT) == (own, [seed + i for i in range(8)])


def test_pipeline_and_tensor_parallel(stages: list[Any], devices: list[str]) -> None:
    """Two stages of two ranks, with collectives in both, and what a pipeline has in flight."""
    with InputNode() as given:
        first = [stage.counted.bind(given) for stage in stages[:2]]
        summed = allreduce.bind(first)
        sent = [each.with_tensor_transport("hccl") for each in
                (stages[0].add.bind(summed[0], 0.0), stages[1].add.bind(summed[1], 100.0))]  # fmt: skip
        second = [stages[2].add.bind(sent[0], 1.0), stages[3].add.bind(sent[1], 1.0)]
        parts = reducescatter.bind(second)
        whole = allgather.bind(parts)
        dag = MultiOutputNode([stage.read_values.bind(each) for stage, each in zip(stages[2:], whole, strict=True)])
    with compiled(dag) as graph:
        refs = [graph.execute(seed) for seed in range(4)]
        for seed, ref in enumerate(refs):
            values = [2.0 * (2 * (i + seed)) + 102.0 for i in range(8)]
            assert ray.get(ref, timeout=LIMIT) == [(devices[2], values), (devices[3], values)]


def test_a_communicator_of_the_user_serves_graphs_in_turn(stages: list[Any], devices: list[str]) -> None:
    from vllm_ray_ascend.ray_transport.communicator import HcclCommunicator

    own = HcclCommunicator.from_actors(stages[:2])
    for seed in (5, 6):
        with compiled(chain(stages[:2], own)) as graph:
            assert ray.get(graph.execute(seed), timeout=LIMIT) == (seed, expected(seed, devices[1]))


def test_overlap(stages: list[Any], devices: list[str]) -> None:
    with compiled(chain(stages[:3]), _overlap_gpu_communication=True) as graph:
        refs = [graph.execute(seed) for seed in range(6)]
        for seed, ref in enumerate(refs):
            assert ray.get(ref, timeout=LIMIT) == (seed, expected(seed, devices[2]))


def test_graphs_at_once_on_the_same_actors() -> None:
    """Ray runs one graph of an actor at a time, unless the actor has more threads for it."""
    two = {"concurrency_groups": {"_ray_system": 2}}
    with new_pair(two, two) as pair, compiled(chain(pair)) as there, compiled(chain(pair[::-1])) as back:
        devices = [about["device"] for about in ray.get([stage.about.remote() for stage in pair])]
        for seed in range(0, 24, 3):
            ways = [(there.execute(seed + i), back.execute(seed + 1 + i)) for i in range(3)]
            for i, (first, second) in enumerate(ways):
                assert ray.get(first, timeout=LIMIT) == (seed + i, expected(seed + i, devices[1]))
                assert ray.get(second, timeout=LIMIT) == (seed + i + 1, expected(seed + i + 1, devices[0]))


def test_a_large_tensor(stages: list[Any]) -> None:
    with InputNode() as given:
        dag = stages[1].total.bind(stages[0].ones.bind(given).with_tensor_transport("hccl"))
    with compiled(dag) as graph:
        assert ray.get(graph.execute(64 << 20), timeout=LIMIT) == float(64 << 20)


# ---- faults


def expect_failure(graph: Any, given: Any, *words: str) -> None:
    """Require that the graph ends with an error that contains the words."""
    with pytest.raises(Exception, match=words[0]) as raised:
        ray.get(graph.execute(given), timeout=LIMIT)
    assert all(word in str(raised.value) for word in words), raised.value


def check_usable(stages: list[Any]) -> None:
    with compiled(chain(stages)) as graph:
        assert ray.get(graph.execute(2), timeout=LIMIT)[0] == 2


@pytest.mark.parametrize(
    ("what", "words"),
    [("complex", ("HCCL cannot move a tensor of torch.complex64",)), ("elsewhere", ("must be on the default device",))],
)
def test_a_tensor_that_cannot_be_sent_ends_the_graph(what: str, words: tuple[str, ...], stages: list[Any]) -> None:
    with InputNode() as given:
        dag = stages[1].read_values.bind(
            stages[0].make_invalid.bind(given).with_tensor_transport("hccl", _direct_return=True)
        )
    with compiled(dag) as graph:
        expect_failure(graph, what, *words)
    check_usable(stages[:2])


def blocked(stages: list[Any]) -> Any:
    with InputNode() as given:
        return stages[1].total.bind(stages[0].block_producer.bind(given).with_tensor_transport("hccl"))


@pytest.fixture
def pair() -> Iterator[list[Any]]:
    """Two actors of a test that breaks a transfer: after a device error nothing is promised of their processes."""
    variables = {**VARIABLES, "VLLM_RAY_ASCEND_TRANSFER_LIMIT_S": SHORT_LIMIT}
    with new_pair({}, {"runtime_env": {"env_vars": variables}}) as actors:
        yield actors


def test_a_tensor_that_is_not_received_in_time(pair: list[Any]) -> None:
    with compiled(blocked(pair)) as graph:
        expect_failure(graph, 5, f"has not ended after {SHORT_LIMIT} s", "VLLM_RAY_ASCEND_TRANSFER_LIMIT_S")


def test_a_graph_is_torn_down_while_an_actor_waits(pair: list[Any]) -> None:
    with compiled(blocked(pair)) as graph:
        ref = graph.execute(5)
        time.sleep(1)
        graph.teardown()
        del ref


def test_the_peer_is_killed_while_an_actor_waits(pair: list[Any], stages: list[Any], devices: list[str]) -> None:
    pid = ray.get(pair[0].about.remote())["pid"]
    with compiled(blocked(pair)) as graph:
        ref = graph.execute(5)
        time.sleep(2)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Exception, match=r"died|is gone|HCCL_E_REMOTE") as raised:
            ray.get(ref, timeout=LIMIT)
        print(raised.value)
    check_usable(stages[:2])  # the driver, and actors that had no part in it


def test_a_wrong_number_of_ranks() -> None:
    from vllm_ray_ascend.errors import TensorTransportError
    from vllm_ray_ascend.ray_transport.communicator import HcclCommunicator

    with pytest.raises(TensorTransportError, match="3 ranks needs as many actors, not 0"):
        HcclCommunicator(3, "", None, [])
