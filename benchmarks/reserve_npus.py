"""Reserve all NPUs of one node of a Ray cluster until standard input is closed."""

from __future__ import annotations

import json
import sys

from benchmarks.protocol import serve


def reserve_npus(address: str) -> None:
    """Reserve the NPUs of the node with ``address`` until this process exits."""
    import ray

    ray.init("auto", log_to_driver=False)
    npus = next(node["Resources"]["NPU"] for node in ray.nodes() if node["NodeManagerAddress"] == address)
    bundle = {"NPU": npus, f"node:{address}": 0.001}
    if not ray.util.placement_group([bundle]).wait(30):
        raise TimeoutError(f"the NPUs of node {address} are in use")


if __name__ == "__main__":
    serve({"hold": lambda: reserve_npus(json.loads(sys.argv[1])["address"])})
