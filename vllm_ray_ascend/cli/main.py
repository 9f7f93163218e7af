"""``vllm-ray-ascend``: one command a module of this folder, each with add_parser(subparsers)."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

import vllm_ray_ascend.cli
from vllm_ray_ascend import __version__
from vllm_ray_ascend.errors import VllmRayAscendError

_USAGE_ERROR = 2
_BROKEN_PIPE = 141  # as a shell counts a process that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's). Returns the exit code; 2 for what the user can mend."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        code = int(args.func(args))
        sys.stdout.flush()
        return code
    except VllmRayAscendError as error:
        print(f"vllm-ray-ascend: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nor shall Python complain at its own exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command. Their modules import nothing heavy: it all works without torch or Ray."""
    parser = argparse.ArgumentParser(prog="vllm-ray-ascend", description="vLLM over Ray on Ascend NPUs")
    parser.add_argument("--version", action="version", version=f"vllm-ray-ascend {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in commands():
        importlib.import_module(f"{vllm_ray_ascend.cli.__name__}.{name}").add_parser(subparsers)
    return parser


def commands() -> list[str]:
    """Names of the commands: the modules of this folder but this one."""
    return sorted(module.name for module in pkgutil.iter_modules(vllm_ray_ascend.cli.__path__) if module.name != "main")


if __name__ == "__main__":
    sys.exit(main())
