"""The driver of Ray, a process on the first node that answers the benchmark: see benchmarks/protocol.py."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from benchmarks.protocol import serve
from benchmarks.transport.methods import WAYS, Method
from benchmarks.transport.options import CASES


class Session:
    """The ways that are open."""

    def __init__(self, case: str, root: str, ray_ascend: str, begin: float) -> None:
        self._case = CASES[case]
        self._root = root
        self._ray_ascend = ray_ascend
        self._ways: dict[str, Method] = {}

    def connect(self) -> int:
        """Join the cluster; the number of its nodes."""
        import ray

        path = ":".join(filter(None, (self._root, self._ray_ascend)))
        sys.path.extend(filter(None, [self._ray_ascend]))
        ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
        nodes = sorted(ray.nodes(), key=lambda node: str(node["NodeManagerHostname"]))
        self._nodes = [str(node["NodeID"]) for node in nodes]
        return len(nodes)

    def open(self, way: str) -> list[dict[str, Any]]:
        """Make a way; where its actors are."""
        made = WAYS[way](self._case, self._nodes)
        made.open()
        self._ways[way] = made
        return made.where

    def hops(self, way: str, size: int, count: int) -> list[float]:
        """Return seconds of each hop."""
        return self._ways[way].hops(size, count)


def main() -> None:
    """Answer until the input ends."""
    session = Session(**json.loads(sys.argv[1]))
    serve({name: getattr(session, name) for name in ("connect", "open", "hops")})
    os._exit(0)  # a graph that failed is not torn down gracefully; Ray takes back what a driver held


if __name__ == "__main__":
    main()
