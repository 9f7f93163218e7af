"""Run the benchmark of executors without a model. See benchmarks/README.md."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from softnpu.errors import SoftNpuError

from benchmarks.machine import collect_machine_facts
from benchmarks.options import RESULTS, BenchError
from benchmarks.report import as_json
from benchmarks.statistics import Sample
from benchmarks.steps.measure import measure
from benchmarks.steps.options import read_options
from benchmarks.steps.report import markdown


def main(arguments: Sequence[str]) -> int:
    """Measure, and write NAME.json and NAME.md, also of a run that failed on its way; the exit code."""
    options = read_options(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # on the way out, clusters are removed
    started = time.monotonic()
    run: dict[str, Any] = {
        **collect_machine_facts(),
        "began": time.strftime("%Y-%m-%d %H:%M"),
        "options": dataclasses.asdict(options),
    }
    samples: list[Sample] = []
    failure = ""
    try:
        for sample in measure(options, lambda line: print(f"{time.monotonic() - started:5.0f} s  {line}", flush=True)):
            samples.append(sample)  # noqa: PERF402  what there is when a later one fails is kept
    except (BenchError, SoftNpuError) as error:
        failure = str(error)
    run["seconds"] = round(time.monotonic() - started)
    path = RESULTS / options.name
    path.with_suffix(".json").write_text(as_json(run, samples))
    path.with_suffix(".md").write_text(markdown(run, samples))
    print(f"\n{markdown(run, samples)}\nwritten: {path}.json, .md")
    if failure:
        print(f"\nthis run is not complete: {failure}", file=sys.stderr)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
