"""How the benchmark talks with its engines: one JSON object a line, a question at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.options import BenchError

_END_LIMIT_S = 60.0


class Child:
    """A process that runs benchmarks.child, as the benchmark sees it."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], log: Path, settings: Mapping[str, Any]
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = json.dumps({**settings, "begin": time.monotonic()})
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [*command, arguments], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream
            )

    def ask(self, what: str, limit_s: float, **arguments: Any) -> Any:
        """Return the answer to ``what``. Raises BenchError when the child exits or is silent for ``limit_s`` s."""
        self.send(what, **arguments)
        return self.answer(limit_s)

    def send(self, what: str, **arguments: Any) -> None:
        """Ask without waiting for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, limit_s: float) -> Any:
        """Return the answer to what was asked last."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            reason = f"ended ({self._exit_code()})" if ready else f"did not answer for {limit_s:g} s"
            raise BenchError(f"an engine's process {reason}: see {self.log}, which ends with\n{_tail(self.log)}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"an engine failed: {answer['error']}. See {self.log}.")
        return answer["result"]

    def _exit_code(self) -> str:
        try:
            return f"exit code {self._process.wait(5)}"
        except subprocess.TimeoutExpired:
            return "no exit code"

    def close(self) -> None:
        """End the process: by closing its input, and by force where that does not do."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def serve(answers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests in the child until there are no more. All printed output goes to the log."""
    answering = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    for question in _questions():
        try:
            answer = {"result": answers[question.pop("do")](**question)}
        except Exception as error:  # noqa: BLE001  whatever it is, the benchmark reports it
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answering.write(json.dumps(answer).encode() + b"\n")


def _questions() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
