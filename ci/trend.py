"""Keep measurements of nightly runs, and report what got worse: `python -m ci.trend TREND.jsonl RESULT... [--fail]`.

A result is a benchmark's JSON (ratios to multiprocessing in the same run) or a fault run's lines of JSON (seconds).
Each call appends one line to the trend file. A metric is compared with the median of the runs before, of the same name
and the same machine: as a ratio, for seconds of different nights mean little.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.options import BASE
from benchmarks.statistics import Sample, figures, percentile

WINDOW = 10
"""Runs before that a metric is compared with."""
FEWEST = 3
"""With fewer of them there is nothing to compare with."""


class Change(NamedTuple):
    """A metric, the median of the runs before, what it is now, and how many times that median."""

    metric: str
    usual: float
    now: float

    @property
    def ratio(self) -> float:
        """1 is as before, 2 twice as much. All metrics are times: more is worse."""
        return self.now / self.usual if self.usual > 0 else float("inf")


def of_benchmark(run: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratios of a benchmark's JSON: "tp2, start, ours" and the like, median over the rounds."""
    found = figures((Sample(**sample) for sample in run["samples"]), BASE)
    return {
        f"{case}, {metric}, {executor}": round(figure.ratio.median, 4)
        for (case, metric, executor), figure in found.items()
        if figure.ratio is not None and executor != BASE
    }


def of_faults(lines: Iterable[str]) -> dict[str, float]:
    """Return the seconds of a fault run by "CASE, METRIC", the slowest where a case occurs twice."""
    found: dict[str, float] = {}
    for line in filter(str.strip, lines):
        entry = dict(json.loads(line))
        case = entry.pop("case")
        for name, value in entry.items():
            if isinstance(value, int | float):  # not the message
                found[f"{case}, {name}"] = max(value, found.get(f"{case}, {name}", 0.0))
    return found


def read_result(path: Path) -> tuple[dict[str, float], str]:
    """Return the metrics of a result file, and the machine if the file names it."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return of_faults(text.splitlines()), ""
    run = json.loads(text)
    machine = run["machine"]
    return of_benchmark(run), f"{machine['cores']} cores, {machine['processor']}"


def changes(before: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[Change]:
    """Return every metric of ``now`` with enough runs ``before`` of the same name and machine, the worst first."""
    same = [run for run in before if (run["name"], run["machine"]) == (now["name"], now["machine"])]
    found = []
    for metric, value in now["metrics"].items():
        earlier = [run["metrics"][metric] for run in same if metric in run["metrics"]][-WINDOW:]
        if len(earlier) >= FEWEST:
            found.append(Change(metric, percentile(earlier, 0.5), value))
    return sorted(found, key=lambda change: -change.ratio)


def report(found: Sequence[Change], tolerance: float) -> str:
    """Return Markdown: the metrics that exceed ``tolerance`` times their usual value, or that none does."""
    worse = [change for change in found if change.ratio > tolerance]
    if not found:
        return f"Nothing to compare with yet: a metric needs {FEWEST} earlier runs on this machine.\n"
    if not worse:
        most = found[0]
        most_of = f"most {most.metric}: {most.ratio:.2f}"
        return f"{len(found)} metrics, none more than {tolerance:g} times as before; {most_of}.\n"
    rows = [f"| {each.metric} | {each.usual:.3g} | {each.now:.3g} | **{each.ratio:.2f}** |" for each in worse]
    head = [f"{len(worse)} of {len(found)} metrics are more than {tolerance:g} times as before:", ""]
    return "\n".join([*head, "| metric | before | now | ratio |", "|---|---|---|---|", *rows]) + "\n"


def main(arguments: list[str]) -> int:
    """Append the results to the trend file and print what changed; 1 with --fail where something got worse."""
    options = _parser().parse_args(arguments)
    path: Path = options.trend
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    worse = False
    for result in options.results:
        metrics, machine = read_result(result)
        metrics = {name: value for name, value in metrics.items() if options.metric in name}
        run = {
            "when": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "commit": options.commit,
            "name": result.stem,
            "machine": options.machine or machine,
            "metrics": metrics,
        }
        found = changes(before, run)
        print(f"{result.stem}: {report(found, options.tolerance)}")
        worse |= any(change.ratio > options.tolerance for change in found)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(run) + "\n")
    return int(worse and options.fail)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ci.trend", description=__doc__.partition("\n")[0])
    parser.add_argument("trend", type=Path, help="the file to append to")
    parser.add_argument("results", type=Path, nargs="+", help="NAME.json of a benchmark, NAME.jsonl of a fault run")
    parser.add_argument("--metric", default="", help="only metrics with this text in their names")
    parser.add_argument("--tolerance", type=float, default=1.3, help="times as before that are worse (default 1.3)")
    parser.add_argument("--commit", default="", help="what was measured")
    parser.add_argument("--machine", default="", help="a name for the machine, where the result has none")
    parser.add_argument("--fail", action="store_true", help="exit code 1 where something got worse")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
