"""`make bench`: compare executors in one run. See benchmarks/README.md."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import facts
from benchmarks.measure import measure
from benchmarks.options import BASE, RESULTS, Options, read_options
from benchmarks.plot import plot
from benchmarks.report import as_json, markdown
from benchmarks.statistics import Sample, figures
from vllm_ray_ascend.errors import VllmRayAscendError


def main(arguments: Sequence[str]) -> int:
    """Measure, write NAME.json, NAME.md and NAME.png, also of a run that failed on its way; the exit code."""
    options = read_options(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # on the way out, clusters are removed
    started = time.monotonic()
    run: dict[str, Any] = {
        **facts(),
        "began": time.strftime("%Y-%m-%d %H:%M"),
        "options": dataclasses.asdict(options),
    }
    samples: list[Sample] = []
    failure = ""
    try:
        for sample in measure(options, lambda line: _say(started, line)):
            samples.append(sample)  # noqa: PERF402  what there is when a later one fails is kept
    except VllmRayAscendError as error:
        failure = str(error)
    except (KeyboardInterrupt, SystemExit):
        failure = "it was stopped"
    run["seconds"] = round(time.monotonic() - started)
    _write(run, options, samples)
    if failure:
        print(f"\nmake bench: this run is not complete: {failure}", file=sys.stderr)
    return 1 if failure else 0


def _write(run: dict[str, Any], options: Options, samples: list[Sample]) -> None:
    of_metric = figures(samples, BASE)
    text = markdown(run, of_metric)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / options.name
    path.with_suffix(".json").write_text(as_json(run, samples))
    path.with_suffix(".md").write_text(text)
    plot(run, of_metric, path.with_suffix(".png"))
    print(f"\n{text}\nwritten: {path}.json, .md, .png")


def _say(started: float, line: str) -> None:
    print(f"{time.monotonic() - started:5.0f} s  {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
