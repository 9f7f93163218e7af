"""Every metric of ours in one table, and the values that this process has for them. Imports nothing heavy.

Values arise where the executor runs, mostly in the engine core's process. `engine/metrics.py` takes them from there to
vLLM's /metrics and to Ray's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge"]
PREFIX = "vllm_ray_ascend_"
COMMON_LABELS = ("model_name", "engine")
"""Labels that each metric has, with vLLM's meaning: the served model's name, the number of the data parallel rank."""


class Metric(NamedTuple):
    """One metric. Names and units follow Prometheus' conventions: seconds, and ``_total`` for what only grows."""

    name: str
    kind: Kind
    unit: str
    """"seconds" or, for plain numbers, what is counted."""
    help: str
    labels: tuple[str, ...] = ()
    """Beside COMMON_LABELS."""


def _metric(name: str, kind: Kind, unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(PREFIX + name, kind, unit, meaning, labels)


RANKS = _metric("ranks", "gauge", "ranks", "Workers that the engine has when it is whole.")
RANKS_ALIVE = _metric("ranks_alive", "gauge", "ranks", "Workers with a living control connection.")
RANK_INFO = _metric(
    "rank_info",
    "gauge",
    "1 or 0",
    "1 for the NPU (physical id) of each rank, for joins with npu-exporter; 0 once the rank has another one.",
    "rank",
    "node",
    "npu",
)
FAILURES = _metric("failures_total", "counter", "failures", "Failures of the workers.")
FAILURE_INFO = _metric(
    "last_failure_info", "gauge", "1 or 0", "1 for the code of the last failure's first cause (docs/errors.md).", "code"
)
FAILURE_DETECTION = _metric(
    "last_failure_detection_seconds",
    "gauge",
    "seconds",
    "Last failure: from the failed rank's last sign of life to its detection, an upper bound of the latency.",
)
FAILURE_TIME = _metric(
    "last_failure_timestamp_seconds", "gauge", "seconds since 1970", "When the last failure was detected."
)
RESTARTS = _metric("restarts_total", "counter", "restarts", "Restarts of all workers (VLLM_RAY_ASCEND_RECOVER=1).")
RESTART_TIME = _metric("last_restart_seconds", "gauge", "seconds", "Duration of the last restart of all workers.")
DP_RANK_UP = _metric(
    "data_parallel_rank_up", "gauge", "1 or 0", "1 while the data parallel rank takes requests, 0 while it is down."
)
DP_RANK_RESTARTS = _metric(
    "data_parallel_rank_restarts_total",
    "counter",
    "restarts",
    "Restarts of the data parallel rank's engine core (VLLM_RAY_ASCEND_RECOVER=1).",
)
ABORTED = _metric(
    "aborted_requests_total", "counter", "requests", "Running requests that a failure of a worker aborted."
)
PHASES = _metric("startup_phase_seconds", "gauge", "seconds", "Duration of each phase of the last startup.", "phase")
GRAPHS = _metric(
    "graph_captures_total", "counter", "graphs", "Batches for which ACL graphs were captured, on each rank."
)
FALLBACKS = _metric(
    "graph_fallbacks_total", "counter", "fallbacks", "Captures that failed and fell back to fewer graphs."
)
WRITE_TIME = _metric(
    "queue_write_seconds_total", "counter", "seconds", "Time that the engine spent in writes to the workers' queue."
)
WRITES = _metric("queue_writes_total", "counter", "writes", "Writes to the workers' queue: steps and other calls.")
ROUND_TRIP = _metric(
    "control_round_trip_seconds",
    "gauge",
    "seconds",
    "Slowest worker's answer on its control connection, at the last check.",
)
REPORT_TIME = _metric(
    "report_timestamp_seconds",
    "gauge",
    "seconds since 1970",
    "When the engine last reported these values; an old one means that it is stopped, or hangs.",
)

METRICS: Mapping[str, Metric] = {
    metric.name: metric for metric in list(globals().values()) if isinstance(metric, Metric)
}

COUNTERS = tuple(metric for metric in METRICS.values() if metric.kind == "counter" and metric is not DP_RANK_RESTARTS)
"""Those that arise in an engine core's process; the API server counts restarts of the engine cores themselves."""


class Sample(NamedTuple):
    """The value of a metric for one set of labels, as pairs in the order of the table."""

    name: str
    labels: tuple[str, ...]
    value: float


class Values:
    """The values of one process. May be used in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[str, ...]], float] = {}
        self._refresh: Callable[[], None] = lambda: None

    def add(self, metric: Metric, amount: float = 1.0, *labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            key = metric.name, labels
            self._values[key] = self._values.get(key, 0.0) + amount

    def observe(self, count: Metric, total: Metric, amount: float) -> None:
        """Add an occurrence to a counter, and its ``amount`` to another one."""
        with self._lock:
            for key, value in (((count.name, ()), 1.0), ((total.name, ()), amount)):
                self._values[key] = self._values.get(key, 0.0) + value

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[metric.name, labels] = float(value)

    def set_info(self, metric: Metric, rows: Iterable[tuple[str, ...]]) -> None:
        """Set a gauge to 1 for each of ``rows``, and to 0 for what it was set to before."""
        current = set(rows)
        with self._lock:
            for name, labels in list(self._values):
                if name == metric.name:
                    self._values[name, labels] = 0.0
            self._values.update({(metric.name, labels): 1.0 for labels in current})

    def on_read(self, refresh: Callable[[], None]) -> None:
        """Call ``refresh``, in place of an earlier one, before each `read`: it sets what is known only by looking."""
        self._refresh = refresh

    def read(self) -> list[Sample]:
        """Return all values, with those of the function that `on_read` was given."""
        self._refresh()
        with self._lock:
            return [Sample(name, labels, value) for (name, labels), value in sorted(self._values.items())]


VALUES = Values()
"""Those of this process."""
