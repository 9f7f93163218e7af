"""One run of a benchmark from start to files, also one that fails on its way."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from softnpu.errors import SoftNpuError

from benchmarks.machine import collect_machine_facts, sessions_ignored
from benchmarks.options import RESULTS, BenchError
from benchmarks.report import Figures, as_json
from benchmarks.statistics import Sample, figures
from demo.signals import exit_on_sigterm

Run = dict[str, Any]
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What differs: the command's name, how it measures, what ratios are over, and how its figures are shown."""

    command: str
    measure: Callable[[Run, Report], Iterable[Sample]]
    base: str
    markdown: Callable[[Mapping[str, Any], Figures], str]
    plot: Callable[[Mapping[str, Any], Figures, Path], None] | None = None


def record(benchmark: Benchmark, options: Any) -> int:
    """Measure, write NAME.json, NAME.md and, with a plot, NAME.png; the exit code.

    ``options``: a dataclass with a ``name``.
    """
    exit_on_sigterm()
    started = time.monotonic()
    run: Run = {
        **collect_machine_facts(),
        "began": time.strftime("%Y-%m-%d %H:%M"),
        "options": dataclasses.asdict(options),
    }
    samples: list[Sample] = []
    failure = ""
    try:
        with sessions_ignored() as run["machine"]["sessions_ignored"]:
            for sample in benchmark.measure(run, lambda line: _report(started, line)):
                samples.append(sample)  # noqa: PERF402  what there is when a later one fails is kept
    except (BenchError, SoftNpuError) as error:
        failure = str(error)
    except (KeyboardInterrupt, SystemExit):
        failure = "it was stopped"
    run["seconds"] = round(time.monotonic() - started)
    _write(benchmark, run, RESULTS / options.name, samples)
    if failure:
        print(f"\n{benchmark.command}: this run is not complete: {failure}", file=sys.stderr)
    return 1 if failure else 0


def _write(benchmark: Benchmark, run: Run, path: Path, samples: list[Sample]) -> None:
    of_metric = figures(samples, benchmark.base)
    text = benchmark.markdown(run, of_metric)
    RESULTS.mkdir(exist_ok=True)
    path.with_suffix(".json").write_text(as_json(run, samples))
    path.with_suffix(".md").write_text(text)
    written = f"{path}.json, .md"
    if benchmark.plot is not None:
        benchmark.plot(run, of_metric, path.with_suffix(".png"))
        written += ", .png"
    print(f"\n{text}\nwritten: {written}")


def _report(started: float, line: str) -> None:
    print(f"{time.monotonic() - started:5.0f} s  {line}", flush=True)
