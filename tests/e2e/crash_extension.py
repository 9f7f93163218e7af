"""A worker extension that crashes: the first worker of a run that imports it is killed, during its startup.

The variable E2E_CRASH_MARK names a file that marks the run, on a file system that all nodes share.
"""

from __future__ import annotations

import os
import signal


class CrashOnImport:
    """Empty: the import of this module kills the process."""


try:
    os.close(os.open(os.environ["E2E_CRASH_MARK"], os.O_CREAT | os.O_EXCL))
except FileExistsError:
    pass
else:
    os.kill(os.getpid(), signal.SIGKILL)
