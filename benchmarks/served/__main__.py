"""`make bench-served`: what clients see of served engines. See benchmarks/README.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.options import BASE
from benchmarks.record import Benchmark, record
from benchmarks.report import markdown
from benchmarks.served.measure import measure
from benchmarks.served.options import goals, read_options


def main(arguments: Sequence[str]) -> int:
    """Measure, and write NAME.json and NAME.md, also of a run that failed on its way; the exit code."""
    options = read_options(arguments)
    return record(
        Benchmark(
            "make bench-served",
            lambda _, report: measure(options, report),
            BASE,
            lambda run, figures: markdown(run, figures, goals(options)),
        ),
        options,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
