"""Faults of every kind in every phase: what is logged, how soon, and that nothing is left. `make test-faults`.

Not part of `make test`; CI runs it nightly. Each case starts an engine immediately on the NPUs of the case before.

FAULTS_COUNT random cases (FAULTS_SEED) instead of one of each kind; a line of JSON a case goes to FAULTS_OUT. Two
simultaneous runs need clusters of different names: FAULTS_CLUSTER.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from softnpu.cluster.plan import Cluster

from demo.cluster import to_npu_cluster
from demo.options import Options
from demo.server import Server
from demo.train.recitation import DENSE, PROMPTS
from tests.e2e.conftest import ROOT
from tests.e2e.servers import check_text, temporary_cluster
from tests.e2e.test_death import check_no_leftovers
from tests.e2e.test_serve import find_free_port
from tests.faults.inject import Injector
from tests.faults.plan import BREAKS_CLUSTER, Case, Fault, Phase, combinations, expected, one_case_per_kind

_COUNT = int(os.environ.get("FAULTS_COUNT", "0"))
CASES = combinations(int(os.environ.get("FAULTS_SEED", "0")), _COUNT) if _COUNT else one_case_per_kind()
CLUSTER = os.environ.get("FAULTS_CLUSTER", "faults")
OUT = Path(os.environ.get("FAULTS_OUT", ROOT / ".demo" / "faults.jsonl"))
LIMITS = {
    "VLLM_RAY_ASCEND_HANG_S": "20",
    "VLLM_RAY_ASCEND_DEVICE_LIMIT_S": "60",
    "VLLM_RAY_ASCEND_LOAD_LIMIT_S": "60",
    "VLLM_RAY_ASCEND_WARM_UP_LIMIT_S": "60",
    "VLLM_RAY_ASCEND_SILENCE_S": "5",
}
LIMIT_S = 600.0
GRAPHS = '{"cudagraph_capture_sizes": [1, 2]}'
_FILES_OF_A_SERVER = 3
_FILES_OF_TWO_QUEUES = 4
INJECTED_BEFORE_START = {Fault.NO_DEVICE, Fault.NO_CAPTURE}


@dataclasses.dataclass
class ReusableCluster:
    """A cluster that is created again after a fault that breaks it."""

    folder: Path
    sockets: Path
    stack: contextlib.ExitStack
    cluster: Cluster | None = None

    def get(self) -> Cluster:
        if self.cluster is None:
            settings = {node: {"SOFTNPU_FAULTS": f"@{self.folder / str(node)}"} for node in (1, 2)}
            self.cluster = self.stack.enter_context(temporary_cluster(CLUSTER, 2, 1, settings))
        return self.cluster

    def drop(self) -> None:
        self.stack.close()
        self.cluster = None


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReusableCluster]:
    # Sockets have a folder of their own, with a short name: a path of one may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="faults-") as sockets, contextlib.ExitStack() as stack:
        yield ReusableCluster(tmp_path_factory.mktemp("npu-faults"), Path(sockets), stack)


class RequestThread(threading.Thread):
    """A request that runs until it ends or fails; ``started`` is set with its first chunk."""

    def __init__(self, server: Server, prompt: str) -> None:
        super().__init__(daemon=True)
        self._server, self._prompt = server, prompt
        self.started = threading.Event()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        client = openai.OpenAI(base_url=f"{self._server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
        try:
            for _ in client.completions.create(
                model=DENSE.name, prompt=self._prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            ):
                self.started.set()
        except (openai.OpenAIError, httpx.HTTPError) as error:
            self.error = error
        self.started.set()


def create_server(case: Case, cluster: Cluster, sockets: Path, log: Path) -> Server:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_RPC_BASE_PATH": str(sockets), **LIMITS}
    graphs: tuple[str, ...] = ("--compilation-config", GRAPHS)
    if case.fault is Fault.NO_MEMORY and case.phase is Phase.PREFILL:
        # This model never asks for more than torch_npu has kept since the warm-up, unless that keeps nothing.
        environ["PYTORCH_NO_NPU_MEMORY_CACHING"] = "1"
        graphs = ("--enforce-eager",)
    arguments = (
        *("--tensor-parallel-size", str(case.tp), "--pipeline-parallel-size", str(case.pp), "--max-model-len", "512"),
        *("--max-num-seqs", "4", "--kv-cache-memory-bytes", str(16 << 20), *graphs),
    )
    options = Options(model=str(DENSE), port=find_free_port(), arguments=arguments, once=True, npus=1)
    return Server(options, to_npu_cluster(cluster, environ), log)


def wait_until(condition: Callable[[], bool], limit_s: float, description: str) -> float:
    """Return seconds until ``condition()`` is true."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit_s, f"not within {limit_s:g} s: {description}"
        time.sleep(0.02)
    return time.monotonic() - started


def reach_phase(case: Case, server: Server) -> RequestThread | None:
    """Wait until the phase has begun; return the request that runs in it."""
    if case.phase in (Phase.START, Phase.CAPTURE):
        wait_until(lambda: case.phase.value in server.log.read_text(), LIMIT_S, case.phase.value)
        return None
    server.wait_until_healthy()
    if case.phase is Phase.PREFILL:
        return RequestThread(server, " ".join(PROMPTS)[:400])
    if case.phase is Phase.DECODE:
        request = RequestThread(server, PROMPTS[0])
        assert request.started.wait(LIMIT_S) and request.error is None
        return request
    if case.phase is Phase.END:
        server._process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    return None


def max_leftover_files(case: Case) -> int:
    """Return how many files a process that gets SIGKILL may leave.

    Other processes on the node remove those of a worker and of an engine core, unless Ray kills them first, as it may
    during their start.
    """
    if case.fault is Fault.SERVER:
        return _FILES_OF_A_SERVER
    starting = case.phase in (Phase.START, Phase.CAPTURE)
    return _FILES_OF_TWO_QUEUES if case.fault is Fault.DRIVER and starting else 0


def has_exited(server: Server) -> bool:
    return server._process.poll() is not None


def wait_for_cleanup(cluster: Cluster, injector: Injector, limit_s: float) -> float:
    """Return seconds until nothing is left; fails with a list of what is left."""
    started = time.monotonic()
    while True:
        try:
            assert injector.list_processes() == []
            check_no_leftovers(cluster)
        except AssertionError:
            if time.monotonic() - started > limit_s:
                raise
            time.sleep(1)
        else:
            return time.monotonic() - started


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}")
def test_fault(case: Case, clusters: ReusableCluster, tmp_path: Path) -> None:
    cluster = clusters.get()
    injector = Injector(cluster, clusters.folder)
    injector.clear_faults()
    if case.fault in INJECTED_BEFORE_START:
        injector.inject(case)
    seconds: dict[str, float] = {}
    message = ""
    with create_server(case, cluster, clusters.sockets, tmp_path / "log") as server:
        if case.continues_serving:
            server.wait_until_healthy()
            check_text(server, DENSE, 1)
        else:
            request = reach_phase(case, server) if case.fault not in INJECTED_BEFORE_START else None
            if case.fault not in INJECTED_BEFORE_START:
                injector.inject(case)
            if case.phase is Phase.IDLE and case.fault is Fault.SILENT:
                request = RequestThread(
                    server, PROMPTS[0]
                )  # without a request no rank would detect that the peer is silent
            message = check_failure_log(case, server, seconds)
            if request is not None:
                request.join(LIMIT_S)
                assert request.error is not None and not isinstance(request.error, openai.APITimeoutError)
    injector.clear_faults()
    if case.fault in BREAKS_CLUSTER:
        if case.fault is Fault.LINK:
            injector.restore_link(case)
        clusters.drop()
    else:
        seconds["clean"] = wait_for_cleanup(cluster, injector, 180)
    files = [path.name for path in clusters.sockets.iterdir()]
    for name in files:
        (clusters.sockets / name).unlink()
    assert len(files) <= max_leftover_files(case), f"files of sockets are left: {files}"
    append_result(case, seconds, message)


def check_failure_log(case: Case, server: Server, seconds: dict[str, float]) -> str:
    """Check that the log has the expected line and that the server exits; returns that line."""
    started = time.monotonic()
    pattern = expected(case)
    if pattern is not None:
        wait_until(
            lambda: re.search(pattern, server.log.read_text()) is not None or has_exited(server), LIMIT_S, pattern
        )
        seconds["reported"] = time.monotonic() - started
        assert re.search(pattern, server.log.read_text()), f"{server.log} does not contain: {pattern}"
    wait_until(lambda: has_exited(server), LIMIT_S, "exit of the server")
    seconds["exited"] = time.monotonic() - started
    lines = [line for line in server.log.read_text().splitlines() if pattern and re.search(pattern, line)]
    return lines[0].rpartition("] ")[2] if lines else ""


def append_result(case: Case, seconds: dict[str, float], message: str) -> None:
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("a") as stream:
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        stream.write(json.dumps({"case": str(case), **rounded, "message": message}) + "\n")
