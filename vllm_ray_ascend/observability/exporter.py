"""Brings values to a metrics library: prometheus_client, whose registry vLLM's /metrics shows, or Ray's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

from vllm_ray_ascend.observability.metrics import COMMON_LABELS, METRICS, Metric, Sample

Recorder = Callable[[Mapping[str, str], float | None], None]
"""Sets a gauge with these labels to a value, or removes it (None); or adds an amount to a counter."""


class Exporter:
    """Shows values of engines in one library. Counters of an engine that starts again continue."""

    def __init__(self, create_recorder: Callable[[Metric], Recorder]) -> None:
        """``create_recorder`` is called once a metric."""
        self._create_recorder = create_recorder
        self._lock = threading.Lock()
        self._recorders: dict[str, Recorder] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}

    def export(self, samples: Iterable[Sample], model_name: str, engine: str) -> None:
        """Show the values of one engine. Metrics of another version of this package, without a row, are left out."""
        with self._lock:
            for sample in samples:
                metric = METRICS.get(sample.name)
                if metric is not None and len(sample.labels) == len(metric.labels):
                    self._export(metric, (model_name, engine, *sample.labels), sample.value)

    def remove(self, metric: Metric, model_name: str, engine: str) -> None:
        """Show a gauge without further labels no more of an engine."""
        with self._lock:
            if recorder := self._recorders.get(metric.name):
                recorder(dict(zip(COMMON_LABELS, (model_name, engine), strict=True)), None)

    def _export(self, metric: Metric, values: tuple[str, ...], value: float) -> None:
        if metric.name not in self._recorders:
            self._recorders[metric.name] = self._create_recorder(metric)
        if metric.kind == "counter":
            counted = self._counted.get((metric.name, values), 0.0)
            self._counted[metric.name, values] = value
            value = value - counted if value >= counted else value
        self._recorders[metric.name](dict(zip(label_names(metric), values, strict=True)), value)


def label_names(metric: Metric) -> tuple[str, ...]:
    """Return the names of all labels of a metric."""
    return (*COMMON_LABELS, *metric.labels)


def prometheus_recorder(metric: Metric) -> Recorder:
    """Return the recorder for prometheus_client, as vLLM uses it: of several processes the most recent value counts."""
    from prometheus_client import Counter, Gauge

    if metric.kind == "counter":
        counter = Counter(metric.name, metric.help, label_names(metric))
        return lambda labels, amount: counter.labels(**labels).inc(amount or 0)
    gauge = Gauge(metric.name, metric.help, label_names(metric), multiprocess_mode="mostrecent")

    def set_or_remove(labels: Mapping[str, str], value: float | None) -> None:
        if value is None:
            gauge.remove(*(labels[name] for name in label_names(metric)))
        else:
            gauge.labels(**labels).set(value)

    return set_or_remove


def ray_recorder(metric: Metric) -> Recorder:
    """Return the recorder for Ray's metrics: each node's agent shows the values, with the prefix ``ray_``."""
    from ray.util.metrics import Counter, Gauge

    if metric.kind == "gauge":
        gauge = Gauge(metric.name, description=metric.help, tag_keys=label_names(metric))
        return lambda labels, value: gauge.set(value, tags=dict(labels))
    counter = Counter(metric.name, description=metric.help, tag_keys=label_names(metric))
    # Ray refuses an increment by nothing.
    return lambda labels, amount: counter.inc(amount, tags=dict(labels)) if amount else None
