"""vLLM's metrics in Ray, without Ray Serve."""

from __future__ import annotations

from types import ModuleType


def without_serve(module: ModuleType) -> None:
    """Let vLLM's module of Ray metrics, just imported, work where Ray is installed without its extra `serve`.

    vLLM 0.23 to 0.33 import Ray Serve and Ray's metrics in one breath, and where the former fails they refuse both:
    "RayPrometheusMetric requires Ray to be installed". Serve only names a replica, and that it is missing they allow.
    """
    if getattr(module, "ray_metrics", None) is not None:
        return
    try:
        from ray.util import metrics
    except ImportError:
        return
    module.ray_metrics, module.Metric = metrics, metrics.Metric  # type: ignore[attr-defined]
