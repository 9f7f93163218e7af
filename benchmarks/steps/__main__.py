"""Run the benchmark of executors without a model. See benchmarks/README.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.record import Benchmark, record
from benchmarks.steps.measure import measure
from benchmarks.steps.options import read_options
from benchmarks.steps.report import markdown


def main(arguments: Sequence[str]) -> int:
    """Measure, and write NAME.json and NAME.md, also of a run that failed on its way; the exit code."""
    options = read_options(arguments)
    return record(
        Benchmark("make bench-steps", lambda _, report: measure(options, report), options.base, markdown), options
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
