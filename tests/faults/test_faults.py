"""Faults of every kind in every phase: what is said, how soon, and that nothing is left. `make test-faults`, no part of
CI. Each case starts an engine on the NPUs of the one before, at once.

FAULTS_COUNT random cases (FAULTS_SEED) instead of one of each kind; a line of JSON a case goes to FAULTS_OUT. Two runs
at once need clusters of different names: FAULTS_CLUSTER.
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

from demo.options import Options
from demo.place import place_in
from demo.server import Server
from demo.train.recitation import DENSE, PROMPTS
from tests.e2e.conftest import ROOT
from tests.e2e.placed import check_text, cluster_of
from tests.e2e.test_death import check_all_gone
from tests.e2e.test_serve import free_port
from tests.faults.inject import Injector
from tests.faults.plan import BREAKS_THE_CLUSTER, Case, Fault, Phase, combinations, every_kind, expected
from vllm_ray_ascend.softnpu.cluster.plan import Cluster

_COUNT = int(os.environ.get("FAULTS_COUNT", "0"))
CASES = combinations(int(os.environ.get("FAULTS_SEED", "0")), _COUNT) if _COUNT else every_kind()
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
GRAPHS = '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]}'
_OF_A_SERVER = 3
_OF_TWO_QUEUES = 4
BEFORE_THE_START = {Fault.NO_DEVICE, Fault.NO_CAPTURE}


@dataclasses.dataclass
class Made:
    """A cluster that is made anew after a fault that breaks it."""

    folder: Path
    sockets: Path
    stack: contextlib.ExitStack
    cluster: Cluster | None = None

    def get(self) -> Cluster:
        if self.cluster is None:
            settings = {node: {"SOFTNPU_FAULTS": f"@{self.folder / str(node)}"} for node in (1, 2)}
            self.cluster = self.stack.enter_context(cluster_of(CLUSTER, 2, 1, settings))
        return self.cluster

    def drop(self) -> None:
        self.stack.close()
        self.cluster = None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    # Sockets have a folder of their own, with a short name: a path of one may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="faults-") as sockets, contextlib.ExitStack() as stack:
        yield Made(tmp_path_factory.mktemp("npu-faults"), Path(sockets), stack)


class Asking(threading.Thread):
    """A request that runs until it ends or fails; ``first`` is set with its first piece."""

    def __init__(self, server: Server, prompt: str) -> None:
        super().__init__(daemon=True)
        self._server, self._prompt = server, prompt
        self.first = threading.Event()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        client = openai.OpenAI(base_url=f"{self._server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
        try:
            for _ in client.completions.create(
                model=DENSE.name, prompt=self._prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            ):
                self.first.set()
        except (openai.OpenAIError, httpx.HTTPError) as error:
            self.error = error
        self.first.set()


def server_of(case: Case, cluster: Cluster, sockets: Path, log: Path) -> Server:
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
    options = Options(model=str(DENSE), port=free_port(), arguments=arguments, once=True, npus=1)
    return Server(options, place_in(cluster, environ), log)


def until(is_so: Callable[[], bool], limit_s: float, what: str) -> float:
    """Seconds until ``is_so()``."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < limit_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - started


def reach(case: Case, server: Server) -> Asking | None:
    """Return when the phase has come, with the request that runs in it."""
    if case.phase in (Phase.START, Phase.CAPTURE):
        until(lambda: case.phase.value in server.log.read_text(), LIMIT_S, case.phase.value)
        return None
    server.wait_until_healthy()
    if case.phase is Phase.PREFILL:
        return Asking(server, " ".join(PROMPTS)[:400])
    if case.phase is Phase.DECODE:
        asking = Asking(server, PROMPTS[0])
        assert asking.first.wait(LIMIT_S) and asking.error is None
        return asking
    if case.phase is Phase.END:
        server._process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    return None


def most_files(case: Case) -> int:
    """How many a process that gets SIGKILL may leave: of a worker's and an engine core's the others on its node see to
    it, unless Ray kills them first, which it may while they are busy with their start."""
    if case.fault is Fault.SERVER:
        return _OF_A_SERVER
    starting = case.phase in (Phase.START, Phase.CAPTURE)
    return _OF_TWO_QUEUES if case.fault is Fault.DRIVER and starting else 0


def ended(server: Server) -> bool:
    return server._process.poll() is not None


def all_gone(cluster: Cluster, injector: Injector, limit_s: float) -> float:
    """Seconds until nothing is left; fails with what is."""
    started = time.monotonic()
    while True:
        try:
            assert injector.processes() == []
            check_all_gone(cluster)
        except AssertionError:
            if time.monotonic() - started > limit_s:
                raise
            time.sleep(1)
        else:
            return time.monotonic() - started


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}")
def test_fault(case: Case, made: Made, tmp_path: Path) -> None:
    cluster = made.get()
    injector = Injector(cluster, made.folder)
    injector.calm()
    if case.fault in BEFORE_THE_START:
        injector.inject(case)
    seconds: dict[str, float] = {}
    said = ""
    with server_of(case, cluster, made.sockets, tmp_path / "log") as server:
        if case.serves_on:
            server.wait_until_healthy()
            check_text(server, DENSE, 1)
        else:
            asking = reach(case, server) if case.fault not in BEFORE_THE_START else None
            if case.fault not in BEFORE_THE_START:
                injector.inject(case)
            if case.phase is Phase.IDLE and case.fault is Fault.SILENT:
                asking = Asking(server, PROMPTS[0])  # who is not asked is not found to be silent
            said = check_told(case, server, seconds)
            if asking is not None:
                asking.join(LIMIT_S)
                assert asking.error is not None and not isinstance(asking.error, openai.APITimeoutError)
    injector.calm()
    if case.fault in BREAKS_THE_CLUSTER:
        if case.fault is Fault.LINK:
            injector.join_link(case)
        made.drop()
    else:
        seconds["clean"] = all_gone(cluster, injector, 180)
    files = [path.name for path in made.sockets.iterdir()]
    for name in files:
        (made.sockets / name).unlink()
    assert len(files) <= most_files(case), f"files of sockets are left: {files}"
    note(case, seconds, said)


def check_told(case: Case, server: Server, seconds: dict[str, float]) -> str:
    """The log says what it has to, and the server ends. Returns the line that says it."""
    started = time.monotonic()
    pattern = expected(case)
    if pattern is not None:
        until(lambda: re.search(pattern, server.log.read_text()) is not None or ended(server), LIMIT_S, pattern)
        seconds["told"] = time.monotonic() - started
        assert re.search(pattern, server.log.read_text()), f"{server.log} does not say: {pattern}"
    until(lambda: ended(server), LIMIT_S, "the end of the server")
    seconds["ended"] = time.monotonic() - started
    lines = [line for line in server.log.read_text().splitlines() if pattern and re.search(pattern, line)]
    return lines[0].rpartition("] ")[2] if lines else ""


def note(case: Case, seconds: dict[str, float], said: str) -> None:
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with OUT.open("a") as stream:
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        stream.write(json.dumps({"case": str(case), **rounded, "said": said}) + "\n")
