"""``vllm-ray-ascend env``: every switch with its value, default and meaning; or every variable with its scope."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from vllm_ray_ascend.environment.redact import redact_value
from vllm_ray_ascend.environment.table import TABLE, Scope, Variable, find_variable
from vllm_ray_ascend.patches import KINDS, PATCHES, Patch
from vllm_ray_ascend.settings import Switch, list_switches, unknown_variables

_HEADINGS: Mapping[Scope, str] = {
    "node": "Scope node: never copied from the driver. Set them before `ray start` on each node.",
    "copied": "Scope copied: from the driver to workers and engine cores.",
    "secret": "Secret: never shown.",
}


class ListedVariable(NamedTuple):
    """One variable as `env --variables` lists it; ``value`` is None where it is not set."""

    variable: str
    scope: Scope
    value: str | None
    meaning: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("env", help="list every VLLM_RAY_ASCEND switch: value, default, meaning")
    parser.add_argument("--json", action="store_true", help="as JSON, one object a switch or variable")
    parser.add_argument(
        "--variables",
        action="store_true",
        help="list the variables of the NPU stack instead: the scope of each (node, copied, secret) and its value here",
    )
    parser.add_argument(
        "--patches",
        action="store_true",
        help="list the names of vLLM, vllm-ascend, Ray and torch that this plugin patches instead: how, where and why",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the switches. A bad value is an error, and so is a variable with our prefix that is not a switch."""
    if args.patches:
        return _print_patches(as_json=args.json)
    if args.variables:
        return _print_variables(list_variables(os.environ), as_json=args.json)
    found = list_switches()
    print(
        json.dumps([switch._asdict() for switch in found], indent=2)
        if args.json
        else "\n".join(map(_format_switch, found))
    )
    misspelled = unknown_variables(os.environ)
    for name in misspelled:
        print(f"VRA-142: {name} is set, but is not a switch of vllm-ray-ascend. Correct or unset it.", file=sys.stderr)
    return 1 if misspelled else 0


def list_variables(environ: Mapping[str, str]) -> list[ListedVariable]:
    """Return the known variables, and those set in ``environ`` whose name has a known prefix; secrets hidden."""
    entries: dict[str, Variable] = dict(TABLE)
    entries |= {name: found for name in environ if (found := find_variable(name))}
    ordered = sorted(entries.values(), key=lambda entry: (list(_HEADINGS).index(entry.scope), entry.name))
    return [
        ListedVariable(name, scope, redact_value(name, environ[name]) if name in environ else None, meaning)
        for name, scope, meaning in ordered
    ]


def _print_patches(*, as_json: bool) -> int:
    if as_json:
        print(json.dumps([{"targets": patch.targets, **patch._asdict()} for patch in PATCHES], indent=2))
        return 0
    print("\n".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items()))
    for patch in PATCHES:
        print("\n".join(["", *patch.targets, *_patch_lines(patch)]))
    return 0


def _patch_lines(patch: Patch) -> list[str]:
    labels = {
        patch.kind: patch.what,
        "why": patch.why,
        "in": patch.releases,
        "at": patch.applied,
        "by": f"vllm_ray_ascend/{patch.by}",
        "until": patch.removable,
    }
    return [f"    {label}: {text}" for label, text in labels.items()]


def _print_variables(variables: list[ListedVariable], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps([variable._asdict() for variable in variables], indent=2))
        return 0
    for scope, heading in _HEADINGS.items():
        print(heading)
        for variable in (each for each in variables if each.scope == scope):
            setting = f"={variable.value}" if variable.value is not None else "   (not set)"
            print(f"  {variable.variable}{setting}\n      {variable.meaning}")
    return 0


def _format_switch(switch: Switch) -> str:
    setting = f"{switch.variable}={switch.value}"
    return f"{setting}   (default {switch.default}; accepted: {switch.accepted})\n    {switch.meaning}"
