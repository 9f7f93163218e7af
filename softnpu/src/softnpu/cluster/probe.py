"""Print as JSON the nodes that Ray's control store at ADDRESS knows: ``python -I probe.py ADDRESS``.

A separate process, because Ray's client ends the whole process when the control store disappears.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(address: str) -> None:
    """Write [{"name": ..., "alive": ..., "resources": {...}}, ...] to standard output."""
    from ray import _raylet
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    client: Any = _raylet  # compiled, without type information
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
