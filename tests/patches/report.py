"""The report of a script of checks: for each check an empty text, or why it failed."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping

MARKER = "CHECKS "


def run(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run all checks, and print their results in one line."""
    results = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = ""
        except BaseException as error:  # noqa: BLE001  a defect shows as whatever upstream raises; pytest's are no Exception
            traceback.print_exc()
            results[name] = repr(error) or "failed"
    print(MARKER + json.dumps(results), flush=True)
    sys.stdout.flush()


def read(output: str) -> dict[str, str]:
    """Return what `run` has printed. Raises ValueError where a script ended without it."""
    lines = [line for line in output.splitlines() if line.startswith(MARKER)]
    if not lines:
        raise ValueError(f"the checks ended without a report:\n{output[-4000:]}")
    results: dict[str, str] = json.loads(lines[-1].removeprefix(MARKER))
    return results
