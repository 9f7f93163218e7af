"""What a script of checks says: for each check an empty text, or why it failed."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping

MARKER = "CHECKS "


def run(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run all checks, and print one line with what came of them."""
    said = {}
    for name, check in checks.items():
        try:
            check()
            said[name] = ""
        except BaseException as error:  # noqa: BLE001  a defect shows as whatever upstream raises; pytest's are no Exception
            traceback.print_exc()
            said[name] = repr(error) or "failed"
    print(MARKER + json.dumps(said), flush=True)
    sys.stdout.flush()


def read(output: str) -> dict[str, str]:
    """What `run` has printed. Raises ValueError where a script ended without it."""
    lines = [line for line in output.splitlines() if line.startswith(MARKER)]
    if not lines:
        raise ValueError(f"the checks ended without a word:\n{output[-4000:]}")
    said: dict[str, str] = json.loads(lines[-1].removeprefix(MARKER))
    return said
