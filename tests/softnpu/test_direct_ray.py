"""The direct transport between Ray actors on software NPUs of one node, with the real torch_npu."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import torch
from ray.experimental.rdt.rdt_store import __ray_abort_transport__
from ray.experimental.rdt.tensor_transport_manager import CommunicatorMetadata

from tests.softnpu.direct_actor import direct_actor_class
from tests.softnpu.processes import check_python
from tests.softnpu.ranks import ROOT
from vllm_ray_ascend.ray_transport import direct

LIMIT = 120
SHAPES: list[tuple[int, ...]] = [(3, 5), (0, 4), (), (1000, 100)]
NOSET = {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1"}


class Cluster(NamedTuple):
    """Three actors, the last of which sees all NPUs, and the file for fault injection."""

    name: str
    actors: list[Any]
    faults: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    faults = tmp_path_factory.mktemp("faults") / "faults"
    faults.touch()
    variables = {"VLLM_RAY_ASCEND_TRANSFER_LIMIT_S": "10", "SOFTNPU_FAULTS": f"@{faults}"}
    options = {"num_cpus": 8, "resources": {"NPU": 6}, "include_dashboard": False}
    ray.init("local", runtime_env={"env_vars": variables}, **options)
    name = direct.register()
    assert name == direct.register() == direct.NAME
    actors = [create_actor(name), create_actor(name), create_actor(name, NOSET)]
    yield Cluster(name, actors, faults)
    ray.shutdown()


def create_actor(name: str, variables: dict[str, str] | None = None) -> Any:
    actor = ray.remote(resources={"NPU": 1}, num_cpus=0, runtime_env={"env_vars": variables or {}})(
        direct_actor_class(name)
    )
    return actor.remote()


def facts(actor: Any) -> dict[str, Any]:
    found: dict[str, Any] = ray.get(actor.facts.remote(), timeout=LIMIT)
    return found


def sums(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[float]:
    counts = [torch.Size(shape).numel() for shape in shapes]
    return [count * (count - 1) / 2 + count * (seed + number) for number, count in enumerate(counts)]


def check(sender: Any, receiver: Any, seed: int) -> None:
    """Send an object, which arrives on the receiver's own device, and a second one of another shape."""
    where = facts(receiver)["device"]
    for shapes in (SHAPES, SHAPES[:1]):
        devices, found = ray.get(receiver.receive.remote(sender.make_tensors.remote(seed, shapes)), timeout=LIMIT)
        assert devices == [where] * len(shapes)
        assert found == sums(seed, shapes)


@contextmanager
def silence(cluster: Cluster) -> Iterator[None]:
    """Senders take no part in HCCL (fault injection)."""
    cluster.faults.write_text("hccl_silent:rank=0")
    try:
        yield
    finally:
        cluster.faults.write_text("")


def expect_error(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(Exception, match=match):
        ray.get(call(), timeout=LIMIT)


def test_every_actor_to_every_other_on_its_own_npu(cluster: Cluster) -> None:
    found = [facts(actor) for actor in cluster.actors]
    assert len({each["physical"] for each in found}) == 3
    assert found[2]["device"] == f"npu:{found[2]['physical']}" != "npu:0"
    for seed, sender in enumerate(cluster.actors):
        for receiver in cluster.actors:
            if sender is not receiver:
                check(sender, receiver, 10 * seed)


def test_objects_that_are_put_and_got(cluster: Cluster) -> None:
    first, second, third = cluster.actors
    refs = ray.get(third.put.remote(3, cluster.name), timeout=LIMIT)
    for actor in (first, second, third):
        device, total = ray.get(actor.get.remote(refs), timeout=LIMIT)
        assert (device, total) == (facts(actor)["device"], sums(3, [(7, 9)])[0])


def test_what_cannot_be_sent_is_an_error_with_its_reason(cluster: Cluster) -> None:
    first, second, _ = cluster.actors
    expect_error(first.make_host_tensor.remote, "are on cpu; this transport takes those of one NPU")
    refs = ray.get(first.put.remote(3, cluster.name), timeout=LIMIT)
    with pytest.raises(Exception, match="was assigned none by Ray, so there is none to receive on"):
        ray.get(refs[0])
    check(first, second, 5)


@pytest.fixture
def pair(cluster: Cluster) -> Iterator[list[Any]]:
    """Two actors of a test that breaks a transfer, after which their processes are unusable."""
    actors = [create_actor(cluster.name) for _ in range(2)]
    yield actors
    for actor in actors:
        ray.kill(actor)


def expect_refusal(actor: Any, healthy: Any) -> None:
    """Require that the actor's process refuses a transfer, with the reason, once it has noticed the end of another."""
    end, text = time.monotonic() + LIMIT, ""
    while "VRA-545" not in text:
        assert time.monotonic() < end, text
        try:
            ray.get(actor.receive.remote(healthy.make_tensors.remote(1, SHAPES)), timeout=LIMIT)
        except Exception as error:  # noqa: BLE001  its text is what is tested
            text = str(error)
    assert "this process can use its NPU no longer" in text and "ray.kill" in text, text


def test_a_silent_sender_makes_the_receiver_unusable_and_others_stay(cluster: Cluster, pair: list[Any]) -> None:
    sender, receiver = pair
    first, second, _ = cluster.actors
    check(sender, receiver, 6)
    with silence(cluster):
        expect_error(
            lambda: receiver.receive.remote(sender.make_tensors.remote(1, SHAPES)),
            r"(?s)VLLM_RAY_ASCEND_TRANSFER_LIMIT_S",
        )
    expect_refusal(receiver, first)
    check(first, second, 7)


def test_an_abort_ends_a_transfer(cluster: Cluster, pair: list[Any]) -> None:
    sender, receiver = pair
    check(sender, receiver, 6)
    with silence(cluster):
        value = sender.make_tensors.remote(1, SHAPES)
        received = receiver.receive.remote(value)
        time.sleep(2)
        on_errors = receiver.__ray_call__.options(concurrency_group="_ray_system_error")
        ray.get(
            on_errors.remote(__ray_abort_transport__, value.hex(), CommunicatorMetadata(), cluster.name), timeout=LIMIT
        )
        expect_error(lambda: received, "Ray aborted the transfer")


def test_a_sender_that_dies_in_a_transfer(cluster: Cluster, pair: list[Any]) -> None:
    victim, receiver = pair
    first, second, _ = cluster.actors
    check(victim, receiver, 8)
    pid, before = facts(victim)["pid"], ray.get(receiver.threads.remote())
    with silence(cluster):
        received = receiver.receive.remote(victim.make_tensors.remote(1, SHAPES))
        time.sleep(2)
        os.kill(pid, signal.SIGKILL)
        expect_error(lambda: received, f"pid {pid}, node .*is gone")
    end = time.monotonic() + LIMIT  # the thread ends after the receive has failed
    while len(ray.get(receiver.threads.remote(), timeout=LIMIT)) >= len(before):
        assert time.monotonic() < end, "the receiver keeps a link to a dead sender"
        time.sleep(0.2)
    expect_refusal(receiver, first)
    check(first, second, 9)


def test_a_receiver_that_dies_in_a_transfer(cluster: Cluster, pair: list[Any]) -> None:
    sender, victim = pair
    check(sender, victim, 8)
    assert any("DirectSender" in each for each in ray.get(sender.threads.remote(), timeout=LIMIT))
    pid = facts(victim)["pid"]
    with silence(cluster):
        received = victim.receive.remote(sender.make_tensors.remote(1, SHAPES))
        time.sleep(2)
        os.kill(pid, signal.SIGKILL)
        expect_error(lambda: received, "died")
    end = time.monotonic() + LIMIT
    while any("DirectSender" in each for each in ray.get(sender.threads.remote())):
        assert time.monotonic() < end, "the sender keeps a link to a dead receiver"
        time.sleep(0.2)
    expect_refusal(sender, cluster.actors[0])


NAMES = """
import ray
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.collective_tensor_transport import CollectiveTensorTransport
from vllm_ray_ascend.errors import DirectTransportError
from vllm_ray_ascend.ray_transport import direct

class Other(CollectiveTensorTransport):
    def tensor_transport_backend(self):
        return "HCCL"

import torch
register_tensor_transport("HCCL", ["npu"], Other, torch.Tensor)
try:
    direct.register("hccl")
except DirectTransportError as error:
    assert "already has a tensor transport 'HCCL' in this process, __main__.Other: ours" in str(error), error
else:
    raise AssertionError
assert direct.register() == direct.register() == "HCCL_DIRECT"
try:
    direct.register("HCCL")
except DirectTransportError as error:
    assert "is registered as 'HCCL_DIRECT' here" in str(error), error
else:
    raise AssertionError
"""
OLD = """
import ray.experimental.rdt.tensor_transport_manager as module
from vllm_ray_ascend.errors import RayVersionError
from vllm_ray_ascend.ray_transport import direct

del module.FetchRequest  # as in Ray 2.55
try:
    direct.register()
except RayVersionError as error:
    assert "needs Ray 2.56 or later" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.parametrize("code", [NAMES, OLD], ids=["names", "old"])
def test_registration(code: str) -> None:
    check_python(code)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_ray_ascend(first: str, tmp_path: Path) -> None:
    """The real one, in a folder of its own: both transports move tensors between the same actors."""
    options = ["-q", "--no-deps", "--target", str(tmp_path), "ray-ascend==0.1.1"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True, timeout=LIMIT)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    code = f"from tests.softnpu.beside_ray_ascend import main; main({first!r})"
    result = json.loads(check_python(code, PYTHONPATH=path).splitlines()[-1])
    assert result == {"name": "HCCL_DIRECT", "found": [45.0, 55.0, 45.0]}
