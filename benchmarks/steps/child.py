"""One executor in a process that answers the benchmark: see benchmarks/protocol.py."""

from __future__ import annotations

import collections
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.engine import make_config
from benchmarks.protocol import serve
from benchmarks.steps.usage import Usage, difference, pin_to_core, total, used_so_far

_IN_FLIGHT = 2
"""Steps at a time, as vLLM's asynchronous scheduling has them, its default."""


class Session:
    """What this process holds."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._executor: Any = None
        self._computed = 0

    def start(self) -> None:
        """Make the executor, or the part of mp's that another node has."""
        config = _make_config(self._settings)
        if self._settings["node_rank"]:
            from vllm.v1.executor.multiproc_executor import MultiprocExecutor

            self._executor = MultiprocExecutor(config, monitor_workers=False)
        else:
            from vllm.v1.executor import Executor

            base: Any = Executor.get_class(config)
            self._executor = _delayed(base, self._settings["delay_s"])(config)
            self._executor.collective_rpc("bench_pin")
        pin_to_core(0)

    def steps(self, count: int, requests: int) -> dict[str, float]:
        """Run steps as vLLM's engine core does; seconds of each figure a step."""
        before, workers_before = used_so_far(), self._workers()
        started, started_cpu = time.monotonic(), time.thread_time()
        pending: collections.deque[Any] = collections.deque()
        for _ in range(count):
            self._executor.execute_model(self._schedule(requests), non_block=True)
            pending.append(self._executor.sample_tokens(None, non_block=True))
            if len(pending) == _IN_FLIGHT:
                _check(pending.popleft().result(), requests)
        while pending:
            _check(pending.popleft().result(), requests)
        wall, thread = time.monotonic() - started, time.thread_time() - started_cpu
        engine, workers = difference(before, used_so_far()), difference(workers_before, self._workers())
        used = {
            "step": wall,
            "CPU of the engine's thread": thread,
            "CPU of the engine's process": engine["cpu"],
            "CPU of workers": workers["cpu"],
            "CPU of all processes": engine["cpu"] + workers["cpu"],
            "waits of the engine": engine["waits"],
            "waits of workers": workers["waits"],
        }
        return {name: value / count for name, value in used.items()}

    def stop(self) -> None:
        """Stop the executor."""
        self._executor.shutdown()

    def _workers(self) -> Usage:
        """Return what all workers have used together so far."""
        return total(self._executor.collective_rpc("bench_usage"))

    def _schedule(self, requests: int) -> Any:
        """Return the message of a step that decodes one token of each request."""
        from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

        names = [f"cmpl-{number:032x}" for number in range(requests)]
        self._computed += 1
        output = SchedulerOutput.make_empty()
        cached = CachedRequestData.make_empty()
        cached.req_ids, cached.new_block_ids = names, [None] * requests
        cached.num_computed_tokens = cached.num_output_tokens = [self._computed] * requests
        output.scheduled_cached_reqs = cached
        output.num_scheduled_tokens = dict.fromkeys(names, 1)
        output.total_num_scheduled_tokens = requests
        return output


def _check(answer: Any, requests: int) -> None:
    if len(answer.sampled_token_ids) != requests:
        raise ValueError(f"an answer of {len(answer.sampled_token_ids)} requests, not {requests}")


def _delayed(base: type[Any], delay_s: float) -> type[Any]:
    """Return ``base``, with ``delay_s`` seconds of work added to each step."""
    if not delay_s:
        return base

    class Delayed(base):  # type: ignore[misc]
        def execute_model(self, *args: Any, **kwargs: Any) -> Any:
            until = time.perf_counter() + delay_s
            while time.perf_counter() < until:
                pass
            return super().execute_model(*args, **kwargs)

    return Delayed


def _make_config(settings: Mapping[str, Any]) -> Any:
    nodes = settings["nodes"] if settings["backend"] == "mp" else 1
    peers = {"nnodes": nodes, "node_rank": settings["node_rank"], "master_addr": settings["master"]}
    return make_config(
        settings["backend"],
        settings["tp"],
        settings["pp"],
        graphs=False,
        headless=bool(settings["node_rank"]),
        max_num_seqs=64,
        worker_cls="benchmarks.steps.worker.AnsweringWorker",
        **(peers if nodes > 1 else {}),
    )


def main() -> None:
    """Answer until the input ends."""
    session = Session(json.loads(sys.argv[1]))
    serve({name: getattr(session, name) for name in ("start", "steps", "stop")})
    os._exit(0)  # collecting upstream's executor can hang, in zmq's Context.term()


if __name__ == "__main__":
    main()
