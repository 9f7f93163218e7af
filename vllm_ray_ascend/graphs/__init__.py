"""ACL graphs of a worker: captured within the NPU's means, released and captured anew, never left waiting."""

from __future__ import annotations

from vllm_ray_ascend.graphs.release import recapture, release

__all__ = ["recapture", "release"]
