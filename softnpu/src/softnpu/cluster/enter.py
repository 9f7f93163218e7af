"""Run a command inside a node: ``python -I enter.py PID COMMAND...`` joins the namespaces of process PID.

nsenter(1) does the same but, where it has to fork for the process namespace, a signal meant for the command ends
nsenter alone.  This one forwards signals and exits with the status of the command.  It imports nothing of the package,
because it starts every command on a node and has to be quick.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_SHARED = ("mnt", "net", "uts", "ipc")


def main(arguments: list[str]) -> int:
    """Run the command and return its exit status; 127 when it cannot be started."""
    pid, command = int(arguments[0]), arguments[1:]
    folder = os.getcwd()
    # Opened before any of them is joined: afterwards /proc is the node's.
    opened = {kind: os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in (*_SHARED, "pid")}
    _join_namespace(opened["pid"])  # applies to children only
    own_group = not os.isatty(0)  # only a terminal's foreground group may read from it, so stay in that group
    forwarded = set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
    child = os.fork()
    if child == 0:
        if own_group:
            os.setpgid(0, 0)
        _load_libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        for kind in _SHARED:
            _join_namespace(opened[kind])
        _exec_command(command, folder)
    return _forward_signals(child, forwarded, own_group)


def _exec_command(command: list[str], folder: str) -> None:
    try:
        os.chdir(folder)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]!r} on the node: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _forward_signals(child: int, forwarded: set[signal.Signals], own_group: bool) -> int:
    while True:
        received = signal.sigwaitinfo(forwarded)
        if received.si_signo != signal.SIGCHLD:
            # The kernel has sent a terminal's Ctrl-C to a command of the same group already.
            if own_group or received.si_pid != 0:
                os.kill(child, received.si_signo)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _join_namespace(descriptor: int) -> None:
    libc = _load_libc()
    if libc.setns(descriptor, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


def _load_libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
