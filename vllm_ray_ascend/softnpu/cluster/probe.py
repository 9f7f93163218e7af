"""Print as JSON what Ray's control store at ADDRESS says of its nodes: ``python -I probe.py ADDRESS``.

A process of its own, because Ray's client ends the whole process when the control store goes away under it.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(address: str) -> None:
    """Write [{"name": ..., "alive": ..., "resources": {...}}, ...] to standard output."""
    from ray import _raylet
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    client: Any = _raylet  # compiled, and without types
    nodes = client.GcsClient(address=address).get_all_node_info(timeout=5).values()
    print(
        json.dumps(
            [
                {
                    "name": node.node_name,
                    "alive": node.state == GcsNodeInfo.ALIVE,
                    "resources": dict(node.resources_total),
                }
                for node in nodes
            ]
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
