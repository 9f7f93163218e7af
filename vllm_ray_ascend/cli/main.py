"""``vllm-ray-ascend``: one module of this folder for each command, with add_parser(subparsers)."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shlex
import sys
from collections.abc import Sequence

import vllm_ray_ascend.cli
from vllm_ray_ascend import __version__
from vllm_ray_ascend.errors import VllmRayAscendError

_USAGE_ERROR = 2
_BROKEN_PIPE = 141  # the exit code that a shell reports for a process killed by SIGPIPE
_SOFTNPU_MOVED = "software NPUs have a command of their own: softnpu {} (package ascend-softnpu)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's) and return the exit code; 2 for what the user can fix."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "softnpu":
        print(f"vllm-ray-ascend: {_SOFTNPU_MOVED.format(shlex.join(argv[1:]) or '--help')}", file=sys.stderr)
        return _USAGE_ERROR
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        code = int(args.func(args))
        sys.stdout.flush()
        return code
    except VllmRayAscendError as error:
        print(f"vllm-ray-ascend: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except BrokenPipeError:  # the reader (`head`) has closed the pipe; Python must not report it again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command. Their modules import nothing heavy: no torch, no Ray."""
    parser = argparse.ArgumentParser(prog="vllm-ray-ascend", description="vLLM over Ray on Ascend NPUs")
    parser.add_argument("--version", action="version", version=f"vllm-ray-ascend {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in command_names():
        importlib.import_module(f"{vllm_ray_ascend.cli.__name__}.{name}").add_parser(subparsers)
    return parser


def command_names() -> list[str]:
    """Return the names of the commands: the modules of this folder except this one."""
    return sorted(module.name for module in pkgutil.iter_modules(vllm_ray_ascend.cli.__path__) if module.name != "main")


if __name__ == "__main__":
    sys.exit(main())
