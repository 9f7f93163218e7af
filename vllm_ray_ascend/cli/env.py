"""``vllm-ray-ascend env``: every switch with its value, default and meaning; or whose each variable is."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from vllm_ray_ascend.environment.redact import shown
from vllm_ray_ascend.environment.table import TABLE, Belongs, Variable, find
from vllm_ray_ascend.settings import Switch, switches, unknown

_HEADINGS: Mapping[Belongs, str] = {
    "node": "Of the node: never copied from the driver. Set them before `ray start` on each node.",
    "travels": "Travelling: copied from the driver to workers and engines.",
    "secret": "Secret: never shown.",
}


class Listed(NamedTuple):
    """One variable as `env --variables` lists it; ``value`` is None where it is not set."""

    variable: str
    belongs: Belongs
    value: str | None
    meaning: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("env", help="list every VLLM_RAY_ASCEND switch: value, default, meaning")
    parser.add_argument("--json", action="store_true", help="as JSON, one object a switch or variable")
    parser.add_argument(
        "--variables",
        action="store_true",
        help="list the variables of NPU stacks instead: whether each stays on its node or travels, and its value here",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the switches. A bad value is an error, and so is a variable with our prefix that is no switch."""
    if args.variables:
        return _print_variables(listed(os.environ), as_json=args.json)
    found = switches()
    print(json.dumps([switch._asdict() for switch in found], indent=2) if args.json else "\n".join(map(_lines, found)))
    misspelt = unknown(os.environ)
    for name in misspelt:
        print(f"{name} is set, but is no switch", file=sys.stderr)
    return 1 if misspelt else 0


def listed(environ: Mapping[str, str]) -> list[Listed]:
    """The known variables, and those set in ``environ`` that are told by their names; the values redacted."""
    entries: dict[str, Variable] = dict(TABLE)
    entries |= {name: found for name in environ if (found := find(name))}
    ordered = sorted(entries.values(), key=lambda entry: (list(_HEADINGS).index(entry.belongs), entry.name))
    return [
        Listed(name, belongs, shown(name, environ[name]) if name in environ else None, meaning)
        for name, belongs, meaning in ordered
    ]


def _print_variables(variables: list[Listed], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps([variable._asdict() for variable in variables], indent=2))
        return 0
    for belongs, heading in _HEADINGS.items():
        print(heading)
        for variable in (each for each in variables if each.belongs == belongs):
            setting = f"={variable.value}" if variable.value is not None else "   (not set)"
            print(f"  {variable.variable}{setting}\n      {variable.meaning}")
    return 0


def _lines(switch: Switch) -> str:
    setting = f"{switch.variable}={switch.value}"
    return f"{setting}   (default {switch.default}; accepted: {switch.accepted})\n    {switch.meaning}"
