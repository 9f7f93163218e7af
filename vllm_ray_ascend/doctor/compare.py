"""What has changed between two snapshots: versions, files, settings, and what tools say that should not vary. Pure."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from vllm_ray_ascend.doctor.queries import HBM, PROCESSES, QUERIES, TEMPERATURE
from vllm_ray_ascend.doctor.records import Change, NodeRecord, Snapshot

_VARYING = frozenset({HBM, PROCESSES, TEMPERATURE})
"""Queries whose answers differ from minute to minute."""
_KEPT = ("facts", "files", "devices", "environment", "versions", "cann_home", "nnal", "limits", "user", "mtu")


def changes_between(before: Snapshot, now: Snapshot) -> list[Change]:
    """Return every value that differs, node by node, in the order of addresses.

    Of snapshots of two levels, what only one of them has is no change: the other did not ask.
    """
    old, new = _values_by_node(before), _values_by_node(now)
    changes = []
    for address in sorted(old.keys() | new.keys()):
        was, is_now = old.get(address, {}), new.get(address, {})
        if before.level != now.level and was and is_now:
            was, is_now = ({what: each[what] for what in was.keys() & is_now.keys()} for each in (was, is_now))
        changes += [
            Change(address=address, what=what, before=was.get(what), now=is_now.get(what))
            for what in sorted(was.keys() | is_now.keys())
            if was.get(what) != is_now.get(what)
        ]
    return changes


def _values_by_node(snapshot: Snapshot) -> dict[str, dict[str, str]]:
    failed = {failure.address: {"record": failure.reason} for failure in snapshot.failures}
    return {record.address: _values(record) for record in snapshot.nodes} | failed


def _values(record: NodeRecord) -> dict[str, str]:
    plain = msgspec.to_builtins(record, str_keys=True)
    values = _flat({name: plain[name] for name in _KEPT}, "")
    for query in QUERIES.values():
        if query not in _VARYING and not query.twice:
            values |= {
                query.line(die): _text(msgspec.to_builtins(answer))
                for die in record.facts.dies
                if (output := record.outputs.get(query.line(die))) and (answer := query.parse(output.text)) is not None
            }
    return values


def _flat(value: Any, path: str) -> dict[str, str]:
    """Return the leaves of nested dictionaries by their path; lists count as leaves, and long files as single lines."""
    if isinstance(value, dict):
        parts = [_flat(each, f"{path}.{name}" if path else str(name)) for name, each in value.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {path: _text(value)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
