"""`make bench`: compare executors in one run. See benchmarks/README.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.measure import measure
from benchmarks.options import BASE, goals, read_options
from benchmarks.plot import plot
from benchmarks.record import Benchmark, record
from benchmarks.report import markdown


def main(arguments: Sequence[str]) -> int:
    """Measure, write NAME.json, NAME.md and NAME.png, also of a run that failed on its way; the exit code."""
    options = read_options(arguments)
    return record(
        Benchmark(
            "make bench",
            lambda _, report: measure(options, report),
            BASE,
            lambda run, figures: markdown(run, figures, goals(options)),
            plot,
        ),
        options,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
