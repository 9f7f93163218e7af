"""Errors of a worker that surface outside of its step: they are reported with rank, NPU and meaning, and end siblings.

Real workers' queues, threads and control connections; what the device computes is replaced by its end.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from tests.softnpu.test_worker_calls import Workers, create_executor
from vllm_ray_ascend.acl_graphs.release import with_recapture_on_wake
from vllm_ray_ascend.control.client import ControlClient
from vllm_ray_ascend.control.protocol import DeviceOpened
from vllm_ray_ascend.control.server import ControlServer
from vllm_ray_ascend.errors import AdapterError, VllmRayAscendError, WorkerFailedError
from vllm_ray_ascend.executor import executor as executor_module
from vllm_ray_ascend.executor.executor import RayAscendExecutor
from vllm_ray_ascend.executor.supervisor import WorkerSupervisor
from vllm_ray_ascend.executor.worker import RayAscendWorkerProc, phase_reporting_wrapper
from vllm_ray_ascend.ipc.message_queue import CancellableQueue
from vllm_ray_ascend.settings import Settings

LIMIT_S = 30.0
_kept_alive: list[object] = []
"""Queues of tests that are over: ZeroMQ's contexts block where they are collected with sockets that are still open."""
RANK, PHYSICAL = 1, 5
FAILURE = "The Inner error is reported as above. [Error]: ACL stream synchronize failed, error code:507015"
SIBLING = """
import os, sys, time
from tests.softnpu.test_worker_calls import Workers
from vllm_ray_ascend.acl_graphs.release import with_recapture_on_wake
from vllm_ray_ascend.control.client import ControlClient
ControlClient(sys.argv[1], 0, "10.0.0.9", 30.0, on_stop=lambda: os._exit(7), on_terminate=lambda lost: os._exit(9),
    describe_activity=lambda: "waiting in HCCL")
print("connected", flush=True)
time.sleep(600)
"""


class Unfinished(AsyncModelRunnerOutput):  # type: ignore[misc]  # vLLM is untyped
    """A step's output whose computation failed on the device after execute_model had returned."""

    def get_output(self) -> ModelRunnerOutput:
        raise RuntimeError(FAILURE)


class Engine:
    """A supervisor, a worker of rank 1 in this process, and a sibling in another one."""

    def __init__(self) -> None:
        self.failed = threading.Event()
        self.supervisor = WorkerSupervisor(list, Settings(), 240.0, on_failure=lambda _: self.failed.set())
        # As control_address() does, which asks Ray for the node's address.
        server = ControlServer("127.0.0.1", LIMIT_S, self.supervisor._handle_lost_worker)
        self.supervisor._server, address = server, server.address_json()
        self.sibling = subprocess.Popen([sys.executable, "-c", SIBLING, address], stdout=subprocess.PIPE, text=True)
        assert self.sibling.stdout is not None and "connected\n" in iter(self.sibling.stdout.readline, "")
        self.worker = create_worker(address)
        self.responses = MessageQueue.create_from_handle(self.worker.worker_response_mq.export_handle(), 0)
        _kept_alive.append(self)

    def wait_for_cause(self) -> VllmRayAscendError:
        assert self.failed.wait(LIMIT_S) and self.supervisor.cause is not None
        return self.supervisor.cause

    def close(self) -> None:
        self.worker._control.close()
        self.sibling.kill()
        self.sibling.communicate()
        self.supervisor.stop_workers()


def create_worker(address: str) -> Any:
    """Create a worker as far as its responses go."""
    worker: Any = RayAscendWorkerProc.__new__(RayAscendWorkerProc)
    worker._control = ControlClient(
        address,
        RANK,
        "10.0.0.9",
        30.0,
        on_stop=lambda: None,
        on_terminate=lambda _: None,
        describe_activity=lambda: "testing",
    )
    worker._control.send(DeviceOpened(PHYSICAL))
    worker._location = f"node 10.0.0.9, physical NPU {PHYSICAL}"
    worker.rank, worker.worker, worker.use_async_scheduling = RANK, object(), True
    worker.worker_response_mq = CancellableQueue(1, 1)
    worker.async_output_queue = queue.Queue()
    return worker


@pytest.fixture
def engine() -> Iterator[Engine]:
    created = Engine()
    yield created
    created.close()


def start_output_thread(worker: Any) -> threading.Thread:
    thread = threading.Thread(target=worker.async_output_busy_loop, daemon=True)
    thread.start()
    return thread


def check_terminated(process: subprocess.Popen[str]) -> None:
    assert process.wait(LIMIT_S) == 9  # immediately, not by an order to stop


def test_an_error_of_the_device_in_get_output_ends_the_engine_with_its_name(engine: Engine) -> None:
    """Under asynchronous scheduling, vLLM's default, a step's errors of the device surface in another thread."""
    start_output_thread(engine.worker)
    engine.worker.handle_output(Unfinished())
    cause = str(engine.wait_for_cause())
    assert cause.startswith(f"VRA-321: rank {RANK} (node 10.0.0.9, physical NPU {PHYSICAL}) failed: RuntimeError: ")
    assert FAILURE in cause and "507015): " in cause  # with the meaning of the code
    check_terminated(engine.sibling)
    status, text = engine.responses.dequeue(LIMIT_S)
    assert status == WorkerProc.ResponseStatus.FAILURE
    assert text.startswith(f"VRA-370: rank {RANK} (node 10.0.0.9, physical NPU {PHYSICAL}): RuntimeError: {FAILURE}\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_end_of_the_thread_that_answers_is_reported(engine: Engine) -> None:
    """A response that cannot be sent ends the thread, and nobody would learn why this rank answers nothing."""
    thread = start_output_thread(engine.worker)
    engine.worker.handle_output(threading.Lock())
    assert "cannot pickle '_thread.lock' object" in str(engine.wait_for_cause())
    check_terminated(engine.sibling)
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_any_other_call_names_its_rank_and_ends_nothing(engine: Engine) -> None:
    """Such as add_lora: its caller gets the error, and the engine keeps serving."""
    start_output_thread(engine.worker)
    engine.worker.handle_output(ValueError("no adapter there"))
    status, text = engine.responses.dequeue(LIMIT_S)
    assert (status, "no adapter there" in text) == (WorkerProc.ResponseStatus.FAILURE, True)
    assert f"rank {RANK} (node 10.0.0.9" in text and engine.supervisor.cause is None


@pytest.mark.parametrize("path", ["adapters/mine", "/models/adapters/mine", "owner/mine"])
def test_an_adapter_that_a_node_lacks_is_not_found_for_the_server_either(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's server answers 404 where it finds its own text with the path of the request."""
    (tmp_path / "adapters/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    executor: Any = RayAscendExecutor.__new__(RayAscendExecutor)

    def refuse(method: str, args: tuple[Any, ...]) -> None:
        """As a worker of another node does, in whose place vLLM's collective_rpc raises."""
        (request,) = args
        cause = f"VRA-370: rank 1 (node 10.0.0.2): {LoRAAdapterNotFoundError(request.lora_name, request.lora_path)}"
        raise RuntimeError(f"Worker failed with error '{cause}', please check the stack trace above")

    executor.collective_rpc = refuse
    with pytest.raises(AdapterError) as raised:
        executor.add_lora(LoRARequest("mine", 1, path))
    assert str(LoRAAdapterNotFoundError("mine", path)) in str(raised.value)
    assert "rank 1 (node 10.0.0.2)" in str(raised.value)


def test_a_worker_of_elastic_scaling_loads_its_model_in_the_phase_of_the_model() -> None:
    phases: list[Any] = []
    wrapper: Any = phase_reporting_wrapper(phases.append)(0)
    calls: list[str] = []
    wrapper.worker = type("Worker", (), {"elastic_ep_execute": lambda _, method, *args: calls.append(method)})()
    execute: Callable[..., Any] = wrapper.elastic_ep_execute
    execute("load_model")
    execute("switch_and_prepare")
    assert [each.phase for each in phases] == ["model"] and calls == ["load_model", "switch_and_prepare"]


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_step_that_fails_without_a_report_ends_the_engine_before_its_error_is_seen(
    monkeypatch: pytest.MonkeyPatch, waited_for: bool
) -> None:
    """As of a worker that only Ray monitors: siblings are terminated, and recovery sees a failure."""
    workers = Workers()
    for thread in workers.threads:
        thread.start()
    executor = create_executor(workers)
    executor._hang_s = LIMIT_S
    _kept_alive.append(workers)
    monkeypatch.setattr(executor_module, "STEPS", ("fail 1",))

    def call() -> None:
        response = executor.collective_rpc("fail 1", None, (2,), {}, not waited_for)
        response.result()

    with pytest.raises((WorkerFailedError, RuntimeError), match="Worker failed with error"):
        call()
    assert "VRA-371: fail 1 failed: Worker failed with error" in str(executor._supervisor.cause)
    workers.requests.enqueue(("end", (), {}, None))


@pytest.mark.parametrize(
    ("model", "extension", "error", "said"),
    [
        ("/nowhere/m", "", OSError("no config.json"), "VRA-357: node .* has no /nowhere/m"),
        ("m", "a.B", ModuleNotFoundError("No module named 'a'", name="a"), "VRA-393: node .* has no module a "),
    ],
    ids=["model", "extension"],
)
def test_a_node_that_lacks_what_others_have_is_named(model: str, extension: str, error: Exception, said: str) -> None:
    worker: Any = RayAscendWorkerProc.__new__(RayAscendWorkerProc)
    config = {"model_config": SimpleNamespace(model=model)}
    config["parallel_config"] = SimpleNamespace(worker_extension_cls=extension)
    worker._init_kwargs = {"vllm_config": SimpleNamespace(**config)}

    def initialize() -> None:
        raise error

    with pytest.raises(WorkerFailedError, match=said):
        worker._call_initialize(initialize)


def test_a_wake_up_that_raises_can_be_tried_again() -> None:
    worker: Any = type("Worker", (), {})()
    worker._vllm_ray_ascend_sleeping_tags = frozenset({"weights", "kv_cache"})

    def refuse(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        with_recapture_on_wake(refuse)(worker, None)
    assert worker._vllm_ray_ascend_sleeping_tags == {"weights", "kv_cache"}
    with_recapture_on_wake(lambda *_: None)(worker, ["weights"])
    assert worker._vllm_ray_ascend_sleeping_tags == {"kv_cache"}
