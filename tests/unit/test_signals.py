"""A command that gets SIGTERM twice, as from `timeout make conformance`."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import os, signal
from demo.signals import exit_on_sigterm

exit_on_sigterm()
try:
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    os.kill(os.getpid(), signal.SIGTERM)
    print("ended what was started")
"""


def test_a_second_sigterm_does_not_interrupt_the_way_out() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "ended what was started\n"), done.stderr
