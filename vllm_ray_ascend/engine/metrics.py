"""From an engine core's process to vLLM's /metrics: on the sockets by which it returns outputs to its API server.

vLLM's own status of fault tolerance travels in the same way: as the result of a call that nobody made. Of several API
servers the first one has the values, as with vLLM's scheduler statistics.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from vllm_ray_ascend import patches
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.observability.events import EVENTS
from vllm_ray_ascend.observability.exporter import Exporter, prometheus_recorder, ray_recorder
from vllm_ray_ascend.observability.metrics import REPORT_TIME, VALUES, Sample

logger = get_logger(__name__)

CALL_ID = -7310
"""Of our results. vLLM's own calls count up from 0, and its notifications are -1 and -2."""
REPORT_INTERVAL_S = 5.0
"""Between reports; an event causes one immediately."""

_exporter = Exporter(prometheus_recorder)
_hidden: set[tuple[str, str]] = set()
"""Model and number of the engines that are gone, whose last reports may still arrive."""


class Report(msgspec.Struct, frozen=True):
    """The values of one engine."""

    model_name: str
    engine: str
    samples: list[Sample]


def report_values() -> None:
    """Have the engine core that is being created in this process report its values, while it has an API server."""
    patches.wrap("vllm.v1.engine.core.EngineCoreProc.process_output_sockets", _reporting)


def receive_values() -> None:
    """Have this process, that of an API server or of an LLM, show the values of its engine cores with vLLM's own."""
    patches.wrap("vllm.v1.engine.core_client._process_utility_output", _receiving)


def send_to_client(engine: Any, call_id: int, values: Any) -> None:
    """Send plain ``values`` to the first client of an engine core, as the result of a call that nobody made."""
    from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
    from vllm.v1.serial_utils import UtilityResult

    result = UtilityOutput(call_id=call_id, result=UtilityResult(values))
    engine.output_queue.put_nowait((0, EngineCoreOutputs(utility_output=result)))


class Reporter:
    """Sends the values of this process every few seconds, and after each event."""

    def __init__(self, send: Callable[[list[Sample]], None], interval_s: float = REPORT_INTERVAL_S) -> None:
        """``send`` is called in a thread of its own."""
        self._send = send
        self._interval_s = interval_s
        self._due = threading.Event()
        EVENTS.listen(lambda _: self._due.set())
        threading.Thread(target=self._run, daemon=True, name="RayAscendMetrics").start()

    def _run(self) -> None:
        while True:
            try:
                VALUES.set(REPORT_TIME, time.time())
                self._send(VALUES.read())
            except Exception:  # whatever it is: an engine does not end for its metrics
                logger.exception("VRA-364: metrics could not be reported, and are not from now on")
                return
            self._due.wait(self._interval_s)
            self._due.clear()


def _reporting(process: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(process)
    def report_and_process(engine: Any, *args: Any, **kwargs: Any) -> None:
        if engine.log_stats:  # not with --disable-log-stats
            _start_reports(engine)
        process(engine, *args, **kwargs)

    return report_and_process


def _start_reports(engine: Any) -> None:
    config = engine.vllm_config.model_config
    model_name, index = str(config.served_model_name or config.model), str(engine.engine_index)
    ray = Exporter(ray_recorder)

    def send(samples: list[Sample]) -> None:
        send_to_client(engine, CALL_ID, msgspec.to_builtins(Report(model_name, index, samples)))
        ray.export(samples, model_name, index)

    Reporter(send)


def show(samples: Iterable[Sample], model_name: str, engine: str) -> None:
    """Show values of one engine, the data parallel rank ``engine``, with vLLM's own in this process."""
    _hidden.discard((model_name, engine))
    _exporter.export(samples, model_name, engine)


def hide(model_name: str, engine: str) -> None:
    """Show the values no more of an engine that is gone, until `show` is called for one in its place."""
    _hidden.add((model_name, engine))
    _exporter.remove(model_name, engine)


def _receiving(process: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(process)
    def receive_or_process(output: Any, *args: Any, **kwargs: Any) -> None:
        if output.call_id == CALL_ID:
            _show_report(output.result.result)
        else:
            process(output, *args, **kwargs)

    return receive_or_process


def _show_report(values: Any) -> None:
    """Show a report. What is none, as of another version of this package, must not end the client's thread."""
    try:
        report = msgspec.convert(values, Report)
        if (report.model_name, report.engine) not in _hidden:
            _exporter.export(report.samples, report.model_name, report.engine)
    except (msgspec.ValidationError, ValueError) as error:
        logger.debug("metrics of an engine core are not shown: %s", error)
