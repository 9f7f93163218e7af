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

from tests.softnpu.processes import check_python
from tests.softnpu.ranks import ROOT
from tests.softnpu.trader import naming
from vllm_ray_ascend.transport import direct

LIMIT = 120
SHAPES: list[tuple[int, ...]] = [(3, 5), (0, 4), (), (1000, 100)]
NOSET = {"RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1"}


class Place(NamedTuple):
    """Three actors, the last of which sees all NPUs, and where faults are asked for."""

    name: str
    actors: list[Any]
    faults: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    faults = tmp_path_factory.mktemp("faults") / "faults"
    faults.touch()
    variables = {"VLLM_RAY_ASCEND_TRANSFER_LIMIT_S": "10", "SOFTNPU_FAULTS": f"@{faults}"}
    options = {"num_cpus": 8, "resources": {"NPU": 6}, "include_dashboard": False}
    ray.init("local", runtime_env={"env_vars": variables}, **options)
    name = direct.register()
    assert name == direct.register() == direct.NAME
    actors = [trader(name), trader(name), trader(name, NOSET)]
    yield Place(name, actors, faults)
    ray.shutdown()


def trader(name: str, variables: dict[str, str] | None = None) -> Any:
    made = ray.remote(resources={"NPU": 1}, num_cpus=0, runtime_env={"env_vars": variables or {}})(naming(name))
    return made.remote()


def facts(actor: Any) -> dict[str, Any]:
    found: dict[str, Any] = ray.get(actor.facts.remote(), timeout=LIMIT)
    return found


def sums(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[float]:
    counts = [torch.Size(shape).numel() for shape in shapes]
    return [count * (count - 1) / 2 + count * (seed + number) for number, count in enumerate(counts)]


def check(giver: Any, taker: Any, seed: int) -> None:
    """A gift arrives, on the taker's own device, and a second one of another shape."""
    where = facts(taker)["device"]
    for shapes in (SHAPES, SHAPES[:1]):
        devices, found = ray.get(taker.take.remote(giver.give.remote(seed, shapes)), timeout=LIMIT)
        assert devices == [where] * len(shapes)
        assert found == sums(seed, shapes)


@contextmanager
def silence(place: Place) -> Iterator[None]:
    """Senders take no part in HCCL."""
    place.faults.write_text("hccl_silent:rank=0")
    try:
        yield
    finally:
        place.faults.write_text("")


def refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(Exception, match=match):
        ray.get(call(), timeout=LIMIT)


def test_every_actor_to_every_other_on_its_own_npu(place: Place) -> None:
    found = [facts(actor) for actor in place.actors]
    assert len({each["physical"] for each in found}) == 3
    assert found[2]["device"] == f"npu:{found[2]['physical']}" != "npu:0"
    for seed, giver in enumerate(place.actors):
        for taker in place.actors:
            if giver is not taker:
                check(giver, taker, 10 * seed)


def test_objects_that_are_put_and_got(place: Place) -> None:
    first, second, third = place.actors
    refs = ray.get(third.put.remote(3, place.name), timeout=LIMIT)
    for actor in (first, second, third):
        device, total = ray.get(actor.get.remote(refs), timeout=LIMIT)
        assert (device, total) == (facts(actor)["device"], sums(3, [(7, 9)])[0])


def test_what_cannot_be_sent_says_why(place: Place) -> None:
    first, second, _ = place.actors
    refused(first.give_host.remote, "are on cpu; this transport takes those of one NPU")
    refs = ray.get(first.put.remote(3, place.name), timeout=LIMIT)
    with pytest.raises(Exception, match="was assigned none by Ray, so there is none to receive on"):
        ray.get(refs[0])
    check(first, second, 5)


def test_a_silent_sender_and_an_abort_leave_both_actors_usable(place: Place) -> None:
    first, second, _ = place.actors
    check(first, second, 6)
    with silence(place):
        refused(lambda: second.take.remote(first.give.remote(1, SHAPES)), r"(?s)VLLM_RAY_ASCEND_TRANSFER_LIMIT_S")
        gift = first.give.remote(1, SHAPES)
        taken = second.take.remote(gift)
        time.sleep(2)
        on_errors = second.__ray_call__.options(concurrency_group="_ray_system_error")
        ray.get(
            on_errors.remote(__ray_abort_transport__, gift.hex(), CommunicatorMetadata(), place.name), timeout=LIMIT
        )
        refused(lambda: taken, "Ray aborted the transfer")
    check(first, second, 7)


def test_a_sender_that_dies_in_a_transfer(place: Place) -> None:
    _, second, third = place.actors
    victim = trader(place.name)
    check(victim, second, 8)
    pid, before = facts(victim)["pid"], ray.get(second.threads.remote())
    with silence(place):
        taken = second.take.remote(victim.give.remote(1, SHAPES))
        time.sleep(2)
        os.kill(pid, signal.SIGKILL)
        refused(lambda: taken, f"pid {pid}, node .*is gone")
    assert len(ray.get(second.threads.remote(), timeout=LIMIT)) < len(before)
    check(third, second, 9)


def test_a_receiver_that_dies_in_a_transfer(place: Place) -> None:
    first, second, _ = place.actors
    before = ray.get(first.threads.remote(), timeout=LIMIT)
    victim = trader(place.name)
    check(first, victim, 8)
    pid = facts(victim)["pid"]
    with silence(place):
        taken = victim.take.remote(first.give.remote(1, SHAPES))
        time.sleep(2)
        os.kill(pid, signal.SIGKILL)
        refused(lambda: taken, "died")
    end = time.monotonic() + LIMIT
    while ray.get(first.threads.remote()) != before and time.monotonic() < end:
        time.sleep(0.2)
    assert ray.get(first.threads.remote()) == before, "the sender keeps a link to a receiver that is dead"
    check(first, second, 9)


NAMES = """
import ray
from ray.experimental import register_tensor_transport
from ray.experimental.rdt.collective_tensor_transport import CollectiveTensorTransport
from vllm_ray_ascend.errors import DirectTransportError
from vllm_ray_ascend.transport import direct

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
from vllm_ray_ascend.transport import direct

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
    said = json.loads(check_python(code, PYTHONPATH=path).splitlines()[-1])
    assert said == {"name": "HCCL_DIRECT", "found": [45.0, 55.0, 45.0]}
