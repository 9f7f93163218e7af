"""A worker extension that dies: the first worker of a run that imports it is killed, in the middle of its start.

The variable E2E_DYING names a file that marks the run, on a file system which all nodes share.
"""

from __future__ import annotations

import os
import signal


class Dying:
    """Nothing: the import is what kills."""


try:
    os.close(os.open(os.environ["E2E_DYING"], os.O_CREAT | os.O_EXCL))
except FileExistsError:
    pass
else:
    os.kill(os.getpid(), signal.SIGKILL)
