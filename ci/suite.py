"""Run suites and report what ran, what was left out and why: `ci/run_suite.sh SUITE...`, or `all`.

Exit code 0: every test that ran passed. 1: some failed. 2: no such suite. 3: a suite asked for by name
cannot run on this machine. A suite of `all` that cannot run here is left out, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ci import runner as machine
from ci.junit import Outcome, merged, outcome
from ci.suites import EVERY_CHANGE, SUITES, Suite, chosen

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable]
SOFTNPU = [sys.executable, "-m", "softnpu.cli"]
MOST_TO_RERUN = 3
"""More failures than that are not flakes: they are not run again."""
_NO_TESTS = 5  # pytest's exit code
_GRACE_S = 120.0


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        print(*(f"{suite.name:12} {suite.what}" for suite in SUITES.values()), sep="\n")
        return 0
    unknown = [name for name in options.suites if name != "all" and name not in SUITES]
    if unknown or not options.suites:
        print(f"run_suite: {'no suite ' + ', '.join(unknown) if unknown else 'no suite given'}", file=sys.stderr)
        print(f"  one of: {', '.join(SUITES)}; all: {', '.join(EVERY_CHANGE)}", file=sys.stderr)
        return 2
    runner = machine.detect()
    print(f"runner: {runner.describe()}", *(f"  note: {note}" for note in runner.notes), sep="\n", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    rerun = not options.local if options.rerun is None else options.rerun
    left_out: dict[str, list[str]] = {}
    outcomes: dict[str, Outcome] = {}
    for suite in chosen(options.suites):
        if options.local:
            unlimited = dataclasses.replace(suite, minutes=0)
            outcomes[suite.name] = run(unlimited, options.results, rerun, options.pytest)
        elif lacks := suite.lacks(runner.has):
            left_out[suite.name] = lacks
        else:
            outcomes[suite.name] = run(suite, options.results, rerun, options.pytest)
    text = summary(runner.describe(), outcomes, left_out)
    _publish(text, options.results, os.environ)
    _note_flaky(outcomes, options.results)
    if not outcomes or any(name in left_out for name in options.suites):
        return 3
    bad = any(each.failed for each in outcomes.values())
    return int(bad or (options.flaky == "fail" and any(each.flaky for each in outcomes.values())))


def run(suite: Suite, results: Path, rerun: bool, further: list[str]) -> Outcome:
    """Run ``suite``; its JUnit report is ``results``/NAME.xml, with the first failures of what was run again."""
    report, cache = results / f"{suite.name}.xml", results / f".cache-{suite.name}"
    first = _pytest(suite, report, cache, further)
    found = _outcome(report, first)
    rerun = rerun and first == 1 and 0 < len(found.failed) <= MOST_TO_RERUN
    if not rerun:
        return found
    print(f"\n== {suite.name}: {len(found.failed)} failed, run again", flush=True)
    again = results / f"{suite.name}-again.xml"
    code = _pytest(suite, again, cache, ["--last-failed", "--last-failed-no-failures=none", *further])
    if code not in (0, 1) or not again.is_file():
        return found  # the second run has no result: the failures of the first count
    report.write_text(merged(report.read_text(), again.read_text()))
    return outcome(report.read_text())


def _pytest(suite: Suite, report: Path, cache: Path, further: list[str]) -> int:
    report.unlink(missing_ok=True)
    paths = tuple(path for path in suite.paths if (ROOT / path).is_dir())
    suite = dataclasses.replace(suite, paths=paths)
    options = ["--junit-xml", str(report), "-o", f"cache_dir={cache}", "-o", "junit_family=xunit1", *further]
    command = suite.command(PYTHON, SOFTNPU, options)
    print(f"\n== {suite.name}: {suite.what}\n{shlex.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(suite.minutes * 60 or None)
    except KeyboardInterrupt:  # pytest gets Ctrl-C as well, and its fixtures take their clusters down
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        sys.exit(128 + signal.SIGINT)
    except subprocess.TimeoutExpired:
        print(f"run_suite: {suite.name} is stopped after {suite.minutes} minutes", file=sys.stderr)
        process.send_signal(signal.SIGINT)  # as Ctrl-C: fixtures take their clusters down
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        process.kill()
        process.wait()
        return -1


def _outcome(report: Path, code: int) -> Outcome:
    """Return the outcome of the report; a run without report or tests, or with another exit code, has failed too."""
    found = outcome(report.read_text()) if report.is_file() else Outcome()
    if code == 0 and found.ran:
        return found
    if code == 1 and found.failed:
        return found
    reason = "no test was run" if code in (0, _NO_TESTS) else f"pytest ended with exit code {code}"
    return Outcome(found.passed, {**found.failed, "the run itself": reason}, {}, found.skipped, found.seconds)


def summary(runner: str, outcomes: Mapping[str, Outcome], left_out: Mapping[str, list[str]]) -> str:
    """Return Markdown: a table of the suites, every failure, every flake, every reason to skip."""
    lines = [
        f"Runner: {runner}",
        "",
        "| suite | passed | failed | flaky | skipped | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in outcomes.items():
        counts = (each.passed, len(each.failed), len(each.flaky), sum(each.skipped.values()))
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {each.seconds / 60:.1f} |")
    lines += [f"| {name} | not run: needs {'; '.join(needs)} | | | | |" for name, needs in left_out.items()]
    failed = [f"`{name}` `{test}`: {text}" for name, each in outcomes.items() for test, text in each.failed.items()]
    flaky = [f"`{name}` `{test}`: {text}" for name, each in outcomes.items() for test, text in each.flaky.items()]
    skipped = [f"`{name}` {n} x {text}" for name, each in outcomes.items() for text, n in each.skipped.items()]
    for title, texts in (
        ("Failed", failed),
        ("Flaky: failed, then passed when run again; the first failure", flaky),
        ("Skipped", skipped),
    ):
        if texts:
            lines += ["", f"**{title}**", "", *(f"- {text}" for text in texts)]
    return "\n".join(lines) + "\n"


def _publish(text: str, results: Path, environ: Mapping[str, str]) -> None:
    print(f"\n{text}", flush=True)
    (results / "summary.md").write_text(text)
    if page := environ.get("GITHUB_STEP_SUMMARY"):
        with Path(page).open("a") as file:
            file.write(text)


def _note_flaky(outcomes: Mapping[str, Outcome], results: Path) -> None:
    """Write a line of JSON for each flake, and a warning that GitHub shows."""
    flakes = [(name, test, text) for name, each in outcomes.items() for test, text in each.flaky.items()]
    for name, test, text in flakes:
        print(f"::warning title=flaky test in {name}::{test}: {text}", flush=True)
    if flakes:
        with (results / "flaky.jsonl").open("a") as file:
            for name, test, text in flakes:
                entry = {"when": time.strftime("%Y-%m-%dT%H:%M:%S"), "suite": name, "test": test, "failure": text}
                file.write(json.dumps(entry) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ci/run_suite.sh", description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="*", help="names of suites, or all")
    parser.add_argument("--list", action="store_true", help="list the suites")
    parser.add_argument("--results", type=Path, default=ROOT / "ci-results", help="folder for reports")
    parser.add_argument(
        "--rerun",
        action=argparse.BooleanOptionalAction,
        help=f"run up to {MOST_TO_RERUN} failures a second time (default: yes, but not with --local)",
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="as in `make test`: no time limit, and a suite runs also where the machine lacks something",
    )
    parser.add_argument("--flaky", choices=("report", "fail"), default="report", help="whether a flake fails the run")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further arguments of pytest, last")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
