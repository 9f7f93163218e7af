"""vLLM's metrics in Ray, without Ray Serve."""

from __future__ import annotations

from types import ModuleType

from vllm_ray_ascend import patches


def allow_without_serve(module: ModuleType) -> None:
    """Let vLLM's module of Ray metrics, just imported, work where Ray is installed without its extra `serve`.

    vLLM 0.23 to 0.33 import Ray Serve and Ray's metrics in one statement, and where the former fails they refuse both:
    "RayPrometheusMetric requires Ray to be installed". Serve only names a replica, and may be missing for that.
    """
    if getattr(module, "ray_metrics", None) is not None:
        return
    try:
        from ray.util import metrics
    except ImportError:
        return
    patches.apply("vllm.v1.metrics.ray_wrappers.ray_metrics", metrics, module)
    patches.apply("vllm.v1.metrics.ray_wrappers.Metric", metrics.Metric, module)
