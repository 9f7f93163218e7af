"""ACL graphs of a worker: capture within the NPU's resources, release, capture again after a change of groups."""

from __future__ import annotations

from vllm_ray_ascend.acl_graphs.release import recapture, release

__all__ = ["recapture", "release"]
