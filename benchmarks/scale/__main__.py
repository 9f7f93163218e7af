"""`make bench-scale`: cost over the number of ranks. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import start_run
from benchmarks.scale.control import measure_control
from benchmarks.scale.plans import measure_plans
from benchmarks.scale.report import judge, markdown, plot

_RESULTS = Path(__file__).resolve().parent.parent / "results"
_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def main(arguments: Sequence[str]) -> int:
    """Measure, and write NAME.json, NAME.md and NAME.png; the exit code is 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--ranks", type=int, nargs="+", default=_RANKS, help="numbers of ranks")
    parser.add_argument("--deaths", type=int, default=200, help="ranks that die in turn, at most half of all")
    parser.add_argument("--name", default="scale", help="name of the result")
    options = parser.parse_args(arguments)
    run: dict[str, Any] = {
        **start_run(),
        "points": [],
    }
    for ranks in options.ranks:
        point = {"ranks": ranks, **measure_control(ranks, options.deaths), **measure_plans(ranks)}
        run["points"].append(point)
        print(json.dumps({key: round(value, 4) for key, value in point.items()}), flush=True)
    run["goals"] = judge(run["points"])
    run["load_after"] = os.getloadavg()[0]
    (_RESULTS / f"{options.name}.json").write_text(json.dumps(run, indent=1) + "\n")
    (_RESULTS / f"{options.name}.md").write_text(markdown(run))
    plot(run, _RESULTS / f"{options.name}.png")
    return 0 if all(goal["met"] for goal in run["goals"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
