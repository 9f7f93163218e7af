"""Writes docs/grafana/: dashboards of the metrics' table, for vLLM's /metrics and for Ray's, and alert rules.

`python -m ci.grafana`. A metric that is new in vllm_ray_ascend/observability/metrics.py gets its panel by that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_ray_ascend.observability import metrics
from vllm_ray_ascend.observability.metrics import COMMON_LABELS, METRICS, Metric

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "grafana"
RAY_PREFIX = "ray_"
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3
_ENGINE = ", ".join(COMMON_LABELS)
_SELECTED = ", ".join(f'{label}=~"${label}"' for label in COMMON_LABELS)
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(NamedTuple):
    """One diagram: its title, its query, a unit of Grafana's, the legend and what it means."""

    title: str
    query: str
    unit: str
    legend: str
    meaning: str


class Chip(NamedTuple):
    """One metric of npu-exporter, which is shown by rank."""

    name: str
    title: str
    unit: str


CHIPS = (
    Chip("npu_chip_info_utilization", "AI Core utilisation", "percent"),
    Chip("npu_chip_info_hbm_used_memory", "HBM in use", "decmbytes"),
    Chip("npu_chip_info_temperature", "Temperature", "celsius"),
    Chip("npu_chip_info_power", "Power", "watt"),
    Chip("npu_chip_info_health_status", "Health: 1 is healthy", "short"),
    Chip("npu_chip_info_link_status", "RoCE link: 1 is up", "short"),
)
"""As its documents name them; their labels are id and, by Prometheus, instance."""


def metric_panels(prefix: str = "") -> Iterator[Panel]:
    """Yield the diagrams of our metrics, each as its kind asks for. ``prefix`` is Ray's, for values from Ray."""
    shown_together = {metrics.WRITE_TIME.name, metrics.WRITES.name, metrics.RANK_INFO.name}
    for metric in METRICS.values():
        if metric.name not in shown_together:
            yield _panel(metric, prefix)
    writes, seconds = (f"{prefix}{each.name}{{{_SELECTED}}}" for each in (metrics.WRITES, metrics.WRITE_TIME))
    of_each = [f"sum by ({_ENGINE}) (rate({series}[$__rate_interval]))" for series in (seconds, writes)]
    yield Panel(
        "Mean queue write",
        " / ".join(of_each),
        "s",
        _legend(()),
        f"{metrics.WRITE_TIME.help} Divided by their number.",
    )


def chip_panels(prefix: str = "") -> Iterator[Panel]:
    """Yield the diagrams of npu-exporter's metrics, each NPU with the rank that has it."""
    for chip in CHIPS:
        yield Panel(
            chip.title, by_rank(chip.name, prefix), chip.unit, "{{model_name}} rank {{rank}}: {{node}} NPU {{npu}}", ""
        )


def by_rank(chip_metric: str, prefix: str = "") -> str:
    """Return the query of a metric of npu-exporter, with the labels of the rank that has the NPU.

    npu-exporter's ``instance`` is HOST:PORT, with Ray's address of the node as HOST, its ``id`` the physical number.
    """
    of_node = f'label_replace({chip_metric}, "node", "$1", "instance", "(.*):[0-9]+")'
    of_npu = f'max by (node, npu) (label_replace({of_node}, "npu", "$1", "id", "(.*)"))'
    ranks = f"{prefix}{metrics.RANK_INFO.name}{{{_SELECTED}}}"
    return f"{of_npu} * on (node, npu) group_right () (max by ({_ENGINE}, rank, node, npu) ({ranks}) == 1)"


def _panel(metric: Metric, prefix: str) -> Panel:
    series = f"{prefix}{metric.name}{{{_SELECTED}}}"
    labels = ", ".join((*COMMON_LABELS, *metric.labels))
    title = metric.name.removeprefix(metrics.PREFIX).removesuffix("_total").removesuffix("_seconds").replace("_", " ")
    title = title.capitalize()
    unit = "s" if metric.unit.startswith("seconds") else "short"
    query = f"max by ({labels}) ({series})"
    if metric.kind == "counter":
        query = f"sum by ({labels}) (increase({series}[$__range]))"
    elif metric.unit == "seconds since 1970":
        title, query = f"Age of {title.lower().removesuffix(' timestamp')}", f"time() - {query}"
    return Panel(title, query, unit, _legend(metric.labels), metric.help)


def _legend(labels: tuple[str, ...]) -> str:
    return " ".join(["{{model_name}}/dp{{engine}}", *(f"{{{{{label}}}}}" for label in labels)])


def dashboard(prefix: str = "") -> dict[str, Any]:
    """Return a dashboard as Grafana 9 and later import it."""
    source = "Ray's metrics" if prefix else "vLLM's /metrics"
    rows: list[tuple[str, list[Panel]]] = [
        ("Engine and workers", list(metric_panels(prefix))),
        ("NPUs of the ranks (npu-exporter)", list(chip_panels(prefix))),
    ]
    panels: list[dict[str, Any]] = []
    top = 0
    for title, members in rows:
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}})
        for number, panel in enumerate(members):
            row, column = divmod(number, _COLUMNS)
            panels.append(_as_json(panel, column * _WIDTH, top + 1 + row * _HEIGHT))
        top += 1 + -(-len(members) // _COLUMNS) * _HEIGHT
    return {
        "title": f"vllm-ray-ascend ({source})",
        "uid": f"vllm-ray-ascend{'-ray' if prefix else ''}",
        "tags": ["vllm", "ascend", "ray"],
        "schemaVersion": 37,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables(prefix)},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }


def _as_json(panel: Panel, left: int, top: int) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.meaning,
        "datasource": _DATASOURCE,
        "gridPos": {"x": left, "y": top, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [{"refId": "A", "expr": panel.query, "legendFormat": panel.legend, "datasource": _DATASOURCE}],
    }


def _variables(prefix: str) -> list[dict[str, Any]]:
    values = [
        {
            "name": label,
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": f"label_values({prefix}{metrics.RANKS.name}, {label})", "refId": label},
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "refresh": 2,
            "current": {"text": "All", "value": "$__all"},
        }
        for label in COMMON_LABELS
    ]
    return [{"name": "datasource", "type": "datasource", "query": "prometheus"}, *values]


class Alert(NamedTuple):
    """One rule: when ``query`` has a result for ``lasts``."""

    name: str
    query: str
    lasts: str
    severity: str
    summary: str
    action: str


_PLACE = "{{ $labels.model_name }}/dp{{ $labels.engine }}"
_DOCTOR = "Run `vllm-ray-ascend doctor` on a node of the cluster; docs/errors.md has the codes of the log."
ALERTS = (
    Alert(
        "VllmRayAscendRanksMissing",
        f"{metrics.RANKS_ALIVE.name} < {metrics.RANKS.name}",
        "30s",
        "critical",
        f"{_PLACE}: only {{{{ $value }}}} of the workers are alive.",
        _DOCTOR,
    ),
    Alert(
        "VllmRayAscendDataParallelRankDown",
        f"{metrics.DP_RANK_UP.name} == 0",
        "5m",
        "critical",
        f"{_PLACE}: the data parallel rank is down, the others serve.",
        "`grep VRA-145` in the server's log says why it could not be restarted.",
    ),
    Alert(
        "VllmRayAscendWorkerFailed",
        f"increase({metrics.FAILURES.name}[10m]) > 0",
        "0s",
        "warning",
        f"{_PLACE}: a worker failed.",
        "`grep 'event engine_failed'` in the engine's log; `vllm-ray-ascend bundle` collects what a report needs.",
    ),
    Alert(
        "VllmRayAscendRestartsRepeatedly",
        f"increase({metrics.RESTARTS.name}[30m]) >= 3",
        "0s",
        "critical",
        f"{_PLACE}: the workers were restarted {{{{ $value }}}} times in half an hour: the cause persists.",
        _DOCTOR,
    ),
    Alert(
        "VllmRayAscendEngineSilent",
        f"time() - {metrics.REPORT_TIME.name} > 60",
        "30s",
        "critical",
        f"{_PLACE}: the engine core has reported nothing for {{{{ $value }}}} s: it is stopped, or hangs.",
        "`py-spy dump` of the process VLLM::EngineCore shows where.",
    ),
    Alert(
        "VllmRayAscendGraphFallback",
        f"increase({metrics.FALLBACKS.name}[1h]) > 0",
        "0s",
        "warning",
        f"{_PLACE}: fewer ACL graphs than asked for were captured, so that decoding is slower.",
        "VRA-404 in the engine's log has the reason and the configuration that fits.",
    ),
    Alert(
        "VllmRayAscendControlSlow",
        f"{metrics.ROUND_TRIP.name} > 1",
        "5m",
        "warning",
        f"{_PLACE}: a worker takes {{{{ $value }}}} s to answer on its control connection.",
        "Look for overloaded CPUs on the nodes of its workers, and for packet loss between them.",
    ),
    Alert(
        "VllmRayAscendNpuUnhealthy",
        by_rank("npu_chip_info_health_status").replace(f"{{{_SELECTED}}}", "") + " != 1",
        "0s",
        "critical",
        f"{_PLACE}: NPU {{{{ $labels.npu }}}} of {{{{ $labels.node }}}}, rank {{{{ $labels.rank }}}}, is not healthy.",
        _DOCTOR,
    ),
)


def alert_rules() -> str:
    """Return the rules as a file for Prometheus' ``rule_files``. Strings are JSON's, which YAML reads."""
    lines = [
        "# Made by `python -m ci.grafana`. The last rule needs npu-exporter, scraped at Ray's addresses of the nodes.",
        "groups:",
        "  - name: vllm-ray-ascend",
        "    rules:",
    ]
    for alert in ALERTS:
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: {json.dumps(alert.query)}",
            f"        for: {alert.lasts}",
            "        labels:",
            f"          severity: {alert.severity}",
            "        annotations:",
            f"          summary: {json.dumps(alert.summary)}",
            f"          description: {json.dumps(alert.action)}",
        ]
    return "\n".join(lines) + "\n"


def files() -> Mapping[str, str]:
    """Return the name and text of each file in docs/grafana/."""
    return {
        "vllm-ray-ascend.json": json.dumps(dashboard(), indent=2) + "\n",
        "vllm-ray-ascend-ray.json": json.dumps(dashboard(RAY_PREFIX), indent=2) + "\n",
        "alerts.yml": alert_rules(),
    }


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).write_text(text)
