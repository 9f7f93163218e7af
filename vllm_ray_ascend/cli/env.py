"""``vllm-ray-ascend env``: every switch with its value, default and meaning."""

from __future__ import annotations

import argparse
import json
import os
import sys

from vllm_ray_ascend.settings import Switch, switches, unknown


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("env", help="list every VLLM_RAY_ASCEND switch: value, default, meaning")
    parser.add_argument("--json", action="store_true", help="as JSON, one object a switch")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the switches. A bad value is an error, and so is a variable with our prefix that is no switch."""
    found = switches()
    print(json.dumps([switch._asdict() for switch in found], indent=2) if args.json else "\n".join(map(_lines, found)))
    misspelt = unknown(os.environ)
    for name in misspelt:
        print(f"{name} is set, but is no switch", file=sys.stderr)
    return 1 if misspelt else 0


def _lines(switch: Switch) -> str:
    setting = f"{switch.variable}={switch.value}"
    return f"{setting}   (default {switch.default}; accepted: {switch.accepted})\n    {switch.meaning}"
