"""`vllm serve` as a child process: started, watched until it is healthy, stopped."""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from demo.cluster import NpuCluster
from demo.options import DemoError, Options
from demo.torch_release import compile_variables

_START_LIMIT_S = 600.0
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
_STOP_LIMIT_S = 30.0
_REPORT_EVERY_S = 5.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Who wrote a log line, and when: "(EngineCore pid=7) (Worker pid=8, ip=10.77.0.2) ERROR 11-21 06:29:14 [core.py:12] "
_PREFIX = re.compile(r"^(?:\([^()]* ?pid=[^()]*\) )*(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] )?")
_ERROR = re.compile(r"^(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Exit)\b.*:|\berror: ")
# The plugin's line of a healthy start: "..., rank 0 -> 10.77.0.1 NPU 0 (physical 0), ..."
_RANK = re.compile(r"rank (\d+) -> (\S+) (NPU \d+(?: \(physical \d+\))?)")

QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    **compile_variables(),
}
"""Variables for all processes: nothing is sent or fetched, and processes do not fight over the CPUs."""


def serve_command(options: Options, bind: str) -> list[str]:
    """Return the `vllm serve` command line. Later options win, so that SERVE_ARGS can replace any of these."""
    return [
        *("vllm", "serve", options.model, "--served-model-name", Path(options.model).name),
        *("--host", bind, "--port", str(options.port)),
        *("--distributed-executor-backend", "ray"),
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"),
        *("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
        *options.arguments,
    ]


def _end_with_parent() -> None:
    """Request SIGTERM for the child when this process dies, even of SIGKILL: a leaked server would hold its NPUs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Server:
    """A running `vllm serve`; leaving the context stops it."""

    def __init__(self, options: Options, cluster: NpuCluster, log: Path) -> None:
        self.url = f"http://{cluster.address}:{options.port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            # A session of its own: Ctrl-C is ours to pass on, once, at the right moment.
            self._process = subprocess.Popen(
                cluster.command(serve_command(options, cluster.bind)),
                env=cluster.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - takes no lock
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                break
            self._process.send_signal(number)
            try:
                self._process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                print(f"  the server did not end within {_STOP_LIMIT_S:g} s of {number.name}", flush=True)

    def wait_until_healthy(self) -> None:
        """Return when /health answers 200, showing the log's last line meanwhile; DemoError when it never will."""
        started = reported = time.monotonic()
        while not self._healthy():
            self.check()
            now = time.monotonic()
            if now - started > _START_LIMIT_S:
                raise DemoError(f"the server was not healthy after {_START_LIMIT_S:g} s:\n{self._errors()}")
            if now - reported >= _REPORT_EVERY_S:
                print(f"  {now - started:3.0f} s  {self._last_line()}", flush=True)
                reported = now
            time.sleep(0.25)
        print(f"  healthy after {time.monotonic() - started:.0f} s", flush=True)

    def check(self) -> None:
        """Raise DemoError if the server has exited."""
        code = self._process.poll()
        if code is not None:
            raise DemoError(f"the server ended with exit code {code}:\n{self._errors()}")

    def wait(self) -> None:
        """Return never: DemoError when the server ends, KeyboardInterrupt on Ctrl-C."""
        self._process.wait()
        self.check()

    def placement(self) -> list[str]:
        """Return one line per rank, from the log line of a healthy start; empty when the log has none."""
        found = {int(rank): f"rank {rank}: node {node}, {npu}" for rank, node, npu in _RANK.findall(self._text())}
        return [found[rank] for rank in sorted(found)]

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _text(self) -> str:
        return _COLOUR.sub("", self.log.read_text(errors="replace"))

    def _messages(self) -> list[str]:
        """Return the log's lines without their prefixes and without empty ones."""
        return [text for line in self._text().splitlines() if (text := _PREFIX.sub("", line).rstrip())]

    def _last_line(self) -> str:
        messages = self._messages()
        return messages[-1][:110] if messages else "(no output yet)"

    def _errors(self, most: int = 8) -> str:
        """Return the log's first distinct error messages, which name the cause; if there are none, its last lines."""
        messages = self._messages()
        errors = list(dict.fromkeys(message[:500] for message in messages if _ERROR.search(message)))
        return "\n".join([*(f"  {line}" for line in errors[:most] or messages[-most:]), f"(the whole log: {self.log})"])
