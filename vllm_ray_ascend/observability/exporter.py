"""Brings values to a metrics library: prometheus_client, whose registry vLLM's /metrics shows, or Ray's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from vllm_ray_ascend.observability.metrics import COMMON_LABELS, METRICS, Metric, Sample

Labels = Mapping[str, str]


class Recorder(NamedTuple):
    """One metric in a library."""

    record: Callable[[Labels, float], None]
    """Sets a gauge with these labels to a value, or adds an amount to a counter."""
    remove: Callable[[Labels], None] = lambda _: None
    """Shows a gauge with these labels no more, where the library can do that."""


class Exporter:
    """Shows values of engines in one library. Counters of an engine that starts again continue."""

    def __init__(self, create_recorder: Callable[[Metric], Recorder]) -> None:
        """``create_recorder`` is called once a metric."""
        self._create_recorder = create_recorder
        self._lock = threading.Lock()
        self._recorders: dict[str, Recorder] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._gauges: set[tuple[str, tuple[str, ...]]] = set()

    def export(self, samples: Iterable[Sample], model_name: str, engine: str) -> None:
        """Show the values of one engine. Metrics of another version of this package, without a row, are left out."""
        with self._lock:
            for sample in samples:
                metric = METRICS.get(sample.name)
                if metric is not None and len(sample.labels) == len(metric.labels):
                    self._export(metric, (model_name, engine, *sample.labels), sample.value)

    def remove(self, model_name: str, engine: str) -> None:
        """Show no gauge of an engine any more: it is gone, and what it said last is true no longer."""
        with self._lock:
            gone = {(name, values) for name, values in self._gauges if values[:2] == (model_name, engine)}
            self._gauges -= gone
            for name, values in gone:
                self._recorders[name].remove(dict(zip(label_names(METRICS[name]), values, strict=True)))

    def _export(self, metric: Metric, values: tuple[str, ...], value: float) -> None:
        if metric.name not in self._recorders:
            self._recorders[metric.name] = self._create_recorder(metric)
        if metric.kind == "counter":
            counted = self._counted.get((metric.name, values), 0.0)
            self._counted[metric.name, values] = value
            value = value - counted if value >= counted else value
        else:
            self._gauges.add((metric.name, values))
        self._recorders[metric.name].record(dict(zip(label_names(metric), values, strict=True)), value)


def label_names(metric: Metric) -> tuple[str, ...]:
    """Return the names of all labels of a metric."""
    return (*COMMON_LABELS, *metric.labels)


def prometheus_recorder(metric: Metric) -> Recorder:
    """Return the recorder for prometheus_client, as vLLM uses it: of several processes the most recent value counts."""
    from prometheus_client import Counter, Gauge

    if metric.kind == "counter":
        counter = Counter(metric.name, metric.help, label_names(metric))
        return Recorder(lambda labels, amount: counter.labels(**labels).inc(amount))
    gauge = Gauge(metric.name, metric.help, label_names(metric), multiprocess_mode="mostrecent")
    return Recorder(
        lambda labels, value: gauge.labels(**labels).set(value),
        lambda labels: gauge.remove(*(labels[name] for name in label_names(metric))),
    )


def ray_recorder(metric: Metric) -> Recorder:
    """Return the recorder for Ray's metrics: each node's agent shows the values, with the prefix ``ray_``."""
    from ray.util.metrics import Counter, Gauge

    if metric.kind == "gauge":
        gauge = Gauge(metric.name, description=metric.help, tag_keys=label_names(metric))
        return Recorder(lambda labels, value: gauge.set(value, tags=dict(labels)))
    counter = Counter(metric.name, description=metric.help, tag_keys=label_names(metric))
    # Ray refuses an increment by nothing.
    return Recorder(lambda labels, amount: counter.inc(amount, tags=dict(labels)) if amount else None)
