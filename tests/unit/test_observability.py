"""Metrics and events: their tables, values of a process, what libraries get, lines of the log."""

from __future__ import annotations

import json
import logging
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import prometheus_client
import pytest

from vllm_ray_ascend.control.client import ControlClient
from vllm_ray_ascend.control.protocol import EventReported
from vllm_ray_ascend.control.server import ControlServer
from vllm_ray_ascend.engine import metrics as engine_metrics
from vllm_ray_ascend.engine.metrics import CALL_ID, Report, Reporter, _receiving
from vllm_ray_ascend.observability import events, metrics, ray_events
from vllm_ray_ascend.observability.events import EVENTS, Event, Events, engine_name, format_event
from vllm_ray_ascend.observability.exporter import Exporter, label_names, prometheus_recorder
from vllm_ray_ascend.observability.metrics import METRICS, Sample, Values

pytestmark = pytest.mark.unit

LIMIT_S = 30.0


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_names_follow_the_conventions_of_prometheus(metric: metrics.Metric) -> None:
    assert re.fullmatch(r"vllm_ray_ascend_[a-z_]*[a-z]", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert ("seconds" in metric.unit) == ("_seconds" in metric.name)
    assert metric.help.endswith(".") and len(set(label_names(metric))) == len(label_names(metric))


def test_values_are_added_set_and_read_with_what_is_only_known_when_asked() -> None:
    values = Values()
    values.add(metrics.RESTARTS)
    values.add(metrics.RESTARTS, 2)
    values.set(metrics.PHASES, 1.5, "load")
    values.on_read(lambda: values.set(metrics.RANKS_ALIVE, 3))
    assert values.read() == [
        Sample(metrics.RANKS_ALIVE.name, (), 3),
        Sample(metrics.RESTARTS.name, (), 3),
        Sample(metrics.PHASES.name, ("load",), 1.5),
    ]


def test_an_info_of_earlier_ranks_becomes_zero() -> None:
    values = Values()
    values.set_info(metrics.RANK_INFO, [("0", "10.0.0.1", "4"), ("1", "10.0.0.1", "5")])
    values.set_info(metrics.RANK_INFO, [("0", "10.0.0.1", "4"), ("1", "10.0.0.2", "0")])
    assert {sample.labels: sample.value for sample in values.read()} == {
        ("0", "10.0.0.1", "4"): 1,
        ("1", "10.0.0.1", "5"): 0,
        ("1", "10.0.0.2", "0"): 1,
    }


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> prometheus_client.CollectorRegistry:
    """A registry that the metrics created in this test belong to."""
    registry = prometheus_client.CollectorRegistry()
    for kind in (prometheus_client.Counter, prometheus_client.Gauge):
        monkeypatch.setattr(
            prometheus_client,
            kind.__name__,
            lambda *args, kind=kind, **options: kind(*args, registry=registry, **options),
        )
    return registry


def test_prometheus_shows_values_of_each_engine_and_counters_continue(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    exporter = Exporter(prometheus_recorder)
    exporter.export([Sample(metrics.RESTARTS.name, (), 2), Sample(metrics.RANKS_ALIVE.name, (), 4)], "model", "0")
    exporter.export([Sample(metrics.RESTARTS.name, (), 3), Sample(metrics.RANKS_ALIVE.name, (), 3)], "model", "0")
    exporter.export([Sample(metrics.RESTARTS.name, (), 1)], "model", "0")  # a new engine core
    exporter.export([Sample(metrics.PHASES.name, ("load",), 1)], "model", "1")
    exporter.export([Sample("vllm_ray_ascend_of_tomorrow", (), 1), Sample(metrics.RANKS.name, ("x",), 1)], "model", "1")

    def value(metric: metrics.Metric, engine: str, **labels: str) -> float | None:
        return registry.get_sample_value(metric.name, {"model_name": "model", "engine": engine, **labels})

    assert value(metrics.RESTARTS, "0") == 4
    assert value(metrics.RANKS_ALIVE, "0") == 3
    assert value(metrics.PHASES, "1", phase="load") == 1
    assert value(metrics.RANKS, "1") is None
    exporter.remove("model", "1")
    assert value(metrics.PHASES, "1", phase="load") is None and value(metrics.RANKS_ALIVE, "0") == 3


def test_the_server_takes_reports_out_of_the_results_of_calls(registry: prometheus_client.CollectorRegistry) -> None:
    passed: list[Any] = []
    process = _receiving(lambda output, results: passed.append((output, results)))
    wire = json.loads(msgspec.json.encode(Report("model", "0", [Sample(metrics.RANKS.name, (), 4)])))
    process(SimpleNamespace(call_id=CALL_ID, result=SimpleNamespace(result=wire)), {})
    process(SimpleNamespace(call_id=CALL_ID, result=SimpleNamespace(result={"samples": "of another version"})), {})
    other = SimpleNamespace(call_id=3, result=None)
    process(other, {3: "future"})
    assert passed == [(other, {3: "future"})]
    assert registry.get_sample_value(metrics.RANKS.name, {"model_name": "model", "engine": "0"}) == 4


def test_a_new_engine_core_does_not_change_what_the_api_server_counts(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    """It reports each of its counters from 0 on, and the restarts of its rank are none of them."""
    exporter = Exporter(prometheus_recorder)
    for restarts in range(3):
        exporter.export([Sample(metrics.DP_RANK_RESTARTS.name, (), restarts)], "model", "1")
        exporter.export([Sample(counter.name, (), 0) for counter in metrics.COUNTERS], "model", "1")
    labels = {"model_name": "model", "engine": "1"}
    assert registry.get_sample_value(metrics.DP_RANK_RESTARTS.name, labels) == 2


def test_the_last_report_of_an_engine_that_is_gone_does_not_bring_it_back(
    registry: prometheus_client.CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its age would be that of an engine which hangs (docs/grafana/alerts.yml)."""
    monkeypatch.setattr(engine_metrics, "_exporter", Exporter(prometheus_recorder))
    wire = json.loads(msgspec.json.encode(Report("model", "3", [Sample(metrics.REPORT_TIME.name, (), 4)])))
    output = SimpleNamespace(call_id=CALL_ID, result=SimpleNamespace(result=wire))

    def shown() -> float | None:
        return registry.get_sample_value(metrics.REPORT_TIME.name, {"model_name": "model", "engine": "3"})

    process = _receiving(lambda *_: None)
    process(output)
    assert shown() == 4
    engine_metrics.hide("model", "3")
    process(output)
    assert shown() is None
    engine_metrics.show([], "model", "3")
    process(output)
    assert shown() == 4


def test_a_report_follows_an_event_at_once() -> None:
    sent: list[list[Sample]] = []
    changed = threading.Condition()

    def send(samples: list[Sample]) -> None:
        with changed:
            sent.append(samples)
            changed.notify_all()

    Reporter(send, interval_s=3600)
    with changed:
        assert changed.wait_for(lambda: len(sent) == 1, LIMIT_S)
    EVENTS.emit(events.RANKS_ADDED, data_parallel_size=2)
    with changed:
        assert changed.wait_for(lambda: len(sent) == 2, LIMIT_S)
    assert metrics.REPORT_TIME.name in {sample.name for sample in sent[1]}


def test_an_event_is_one_line_of_text_or_json() -> None:
    event = Event("engine_failed", 12.5, "Qwen3/dp0", {"code": "VRA-322", "cause": 'a "b"\nc', "rank": None, "s": 0.5})
    text = format_event(event, "text")
    assert text == r'event engine_failed engine=Qwen3/dp0 code=VRA-322 cause="a \"b\"\nc" rank="" s=0.500'
    line = format_event(event, "json")
    assert "\n" not in line and json.loads(line.removeprefix("event ")) == {
        "event": "engine_failed",
        "time": 12.5,
        "engine": "Qwen3/dp0",
        "fields": {"code": "VRA-322", "cause": 'a "b"\nc', "rank": None, "s": 0.5},
    }


def test_an_engine_is_named_by_model_and_rank() -> None:
    assert engine_name("/models/Qwen3-8B/", 1) == "Qwen3-8B/dp1"
    assert engine_name("qwen", 0) == "qwen/dp0"


def test_an_event_is_logged_or_forwarded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm")
    logging.getLogger("vllm").propagate = True
    heard: list[Event] = []
    forwarded: list[Event] = []
    log = Events()
    log.listen(heard.append)
    log.emit(events.RANKS_ADDED, data_parallel_size=3)
    assert "event ranks_added" in caplog.text and [event.fields for event in heard] == [{"data_parallel_size": 3}]
    log.forward = forwarded.append
    log.emit(events.RANKS_ADDED, data_parallel_size=4)
    assert len(heard) == 1 and len(forwarded) == 1


def test_an_event_is_in_the_list_of_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the file that the agent of its node reads."""
    monkeypatch.setattr(ray_events, "session_log_folder", lambda: tmp_path)
    log = Events()
    log.engine = "Qwen3/dp0"
    for _ in range(2):
        log.listen(ray_events.list_in_ray)
    log.emit(events.ENGINE_FAILED, code="VRA-322", cause="a worker exited", rank=None, detection_seconds=0.5)
    (event,) = map(json.loads, (tmp_path / "events/event_COMMON.log").read_text().splitlines())
    assert event["severity"] == "ERROR" and event["message"].startswith("engine_failed engine=Qwen3/dp0 code=VRA-322")
    assert event["custom_fields"] == {
        "code": "VRA-322",
        "cause": "a worker exited",
        "detection_seconds": "0.5",
        "engine": "Qwen3/dp0",
    }


@pytest.mark.parametrize(
    ("others", "kind"),
    [
        ({}, int),
        ({"RAYLET": '{"timestamp":1796088079}'}, int),
        ({"JOBS": '{"timestamp": "1796088028"}', "RAYLET": '{"timestamp":1796088079}'}, str),
        ({"GCS": "", "CORE_WORKER_7": '{"timest'}, int),
    ],
)
def test_an_event_has_its_time_as_ray_s_own_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: dict[str, str], kind: type
) -> None:
    """Texts and numbers together are more than `ray list cluster-events` can sort."""
    monkeypatch.setattr(ray_events, "session_log_folder", lambda: tmp_path)
    (tmp_path / "events").mkdir()
    for source, line in others.items():
        (tmp_path / f"events/event_{source}.log").write_text(line)
    for _ in range(2):
        ray_events.list_in_ray(Event("ranks_added", 1.0, "", {}))
    lines = (tmp_path / "events/event_COMMON.log").read_text().splitlines()
    assert [type(json.loads(line)["timestamp"]) for line in lines] == [kind, kind]


def test_events_that_ray_cannot_list_are_reported_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("a file, where a folder is needed")
    monkeypatch.setattr(ray_events, "session_log_folder", lambda: tmp_path / "logs")
    logging.getLogger("vllm").propagate = True
    for _ in range(2):
        ray_events.list_in_ray(Event("ranks_added", 1.0, "", {}))
    assert caplog.text.count("VRA-365") == 1


def test_a_worker_s_event_reaches_its_executor() -> None:
    arrived: list[tuple[int, EventReported]] = []
    done = threading.Event()
    server = ControlServer("127.0.0.1", 30.0, lambda _: None)

    def note(rank: int, event: EventReported) -> None:
        arrived.append((rank, event))
        done.set()

    server.on_event = note
    client = ControlClient(
        server.address_json(), 3, "10.0.0.9", 30.0, on_stop=print, on_terminate=lambda _: None, describe_activity=str
    )
    try:
        client.send(EventReported(events.GRAPH_FALLBACK.name, {"reason": "no stream", "graphs": 4}))
        assert done.wait(LIMIT_S)
        assert arrived == [(3, EventReported("graph_fallback", {"reason": "no stream", "graphs": 4}))]
    finally:
        client.close()
        server.close()
