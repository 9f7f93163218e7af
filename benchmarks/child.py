"""One engine, or one executor after another, in a process that answers the benchmark: see protocol.py."""

from __future__ import annotations

import copy
import json
import os
import sys
from typing import Any

from benchmarks import engine, shutdown
from benchmarks.phases import phases
from benchmarks.protocol import serve


class Session:
    """What this process holds."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._begin: float = settings.pop("begin")
        self._settings = settings
        self._config: Any = None
        self._engine: Any = None
        self._pids: list[int] = []
        self._ended: list[Any] = []
        """Kept: collecting one of upstream's whose worker died can hang, in zmq's Context.term()."""

    def start(self) -> dict[str, float]:
        """Make the engine; seconds of each phase since this process was asked for."""
        marks = engine.Marks(begin=self._begin)
        config = engine.make_config(**self._settings)
        self._engine = engine.Engine(config, engine.timed_executor(config, marks))
        marks.mark("engine")
        self._pids, workers = engine.started(self._engine.executor)
        return phases(marks, workers)

    def generate(self, requests: int, tokens: int) -> dict[str, Any]:
        """Generate text as Engine.generate does."""
        result: dict[str, Any] = self._engine.generate(requests, tokens)
        return result

    def call(self, count: int) -> list[float]:
        """Time calls as Engine.call does."""
        return engine.call(self._engine.executor, count)

    def stop(self, watch: bool) -> dict[str, float | None]:
        """Stop the engine's executor. ``watch`` its processes: they are on this node."""
        ends = shutdown.time_shutdown(self._engine.executor, self._pids if watch else [])
        return ends if watch else {"call": ends["call"]}

    def prepare(self) -> None:
        """Make the configuration of bare executors."""
        self._config = engine.make_config(**self._settings)

    def life(self, victim: int | None) -> dict[str, Any]:
        """Make an executor without an engine, and end it: by SIGKILL of rank ``victim``, or by shutdown()."""
        marks = engine.Marks()
        config = copy.deepcopy(self._config)
        marks.mark("begin")
        executor = engine.timed_executor(config, marks)(config)
        pids, workers = engine.started(executor)
        queues = (getattr(executor, name, None) for name in ("rpc_broadcast_mq", "response_mqs"))  # a graph has none
        self._ended.append((executor, *queues))
        end = (
            shutdown.time_shutdown(executor, pids)
            if victim is None
            else shutdown.time_worker_death(executor, pids, victim)
        )
        _give_back(config)
        return {"phases": phases(marks, workers), "end": end}


def _give_back(config: Any) -> None:
    """Remove the placement group that upstream leaves until its driver ends, so that the next executor has NPUs."""
    group = config.parallel_config.placement_group
    if group is not None:
        import ray

        ray.util.remove_placement_group(group)


def main() -> None:
    """Answer until the input ends."""
    session = Session(json.loads(sys.argv[1]))
    names = ("start", "generate", "call", "stop", "prepare", "life")
    serve({name: getattr(session, name) for name in names})
    os._exit(0)  # for the reason that Session._ended gives; Ray takes back what a driver held


if __name__ == "__main__":
    main()
