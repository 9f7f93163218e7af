"""What a command does on SIGTERM."""

from __future__ import annotations

import signal
import sys


def exit_on_sigterm() -> None:
    """End orderly on SIGTERM: on the way out, what was started is ended."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` signals its group, and make its child again: a second one comes
    sys.exit(128 + number)
