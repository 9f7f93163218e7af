"""``vllm-ray-ascend bundle``: one archive with what a bug report needs, of all nodes, without secrets."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from vllm_ray_ascend import __version__
from vllm_ray_ascend.cli.doctor import parse_names, snapshot_of_joined_cluster, take_snapshot
from vllm_ray_ascend.cli.env import list_variables
from vllm_ray_ascend.cli.topology import collect_topology
from vllm_ray_ascend.cluster.connect import connect_as_observer
from vllm_ray_ascend.cluster.probe import live_node_addresses, run_on_nodes
from vllm_ray_ascend.cluster.topology import Topology, format_lines
from vllm_ray_ascend.doctor.bundle import collect_files, decode_files
from vllm_ray_ascend.doctor.judge import choose_checks, make_report
from vllm_ray_ascend.doctor.records import Report, Snapshot
from vllm_ray_ascend.doctor.text import format_report
from vllm_ray_ascend.environment.redact import hide_known, redact_json, redact_text, secrets_of
from vllm_ray_ascend.errors import DoctorError
from vllm_ray_ascend.settings import list_switches

T = TypeVar("T")

_MEGABYTES = 5
_LIMIT_S = 120.0
_NODES = "nodes/"


class _Failed(NamedTuple):
    """Why a part of the bundle is missing: what is broken is what a bundle is made for."""

    traceback: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("bundle", help="one archive of all nodes for a bug report: doctor, logs, failures")
    parser.add_argument("--address", default="auto", help="the Ray cluster's address (default: that of this node)")
    parser.add_argument("--local", action="store_true", help="this node alone, without Ray")
    parser.add_argument("--nodes", type=parse_names, default=[], metavar="A,B", help="only these: addresses or names")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the archive (default: here, named by the time)")
    parser.add_argument(
        "--megabytes", type=int, default=_MEGABYTES, metavar="N", help="ends of logs of each node and kind (default: 5)"
    )
    parser.add_argument(
        "--timeout", type=float, default=_LIMIT_S, metavar="S", help="seconds for all nodes (default: 120)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Write the archive and say what is in it. A node that does not answer is named in it."""
    path = args.output or Path(time.strftime("vllm-ray-ascend-bundle-%Y%m%d-%H%M%S.tar.gz"))
    files = _collect_local(args) if args.local else _collect_cluster(args)
    secrets = secrets_of(os.environ)
    texts = {name: _redact(name, text, secrets) for name, text in files.items()}
    _write_archive(path, texts)
    print(f"{path}: {len(texts)} files, {path.stat().st_size >> 10} KiB. README.txt in it says what each file is.")
    print(
        "Secrets are hidden as far as they can be recognised; names and addresses of hosts, and paths, are in it. Look"
    )
    print("through it before you send it (`tar xzf`).")
    return 0


def _redact(name: str, text: str, secrets: Collection[str]) -> str:
    """Return a file without secrets. Logs of nodes come without their own; this process's may be others."""
    if name.endswith(".json"):
        return redact_json(text, secrets)
    return hide_known(text, secrets) if name.startswith(_NODES) else redact_text(text, secrets)


def _collect_local(args: argparse.Namespace) -> dict[str, str]:
    snapshot = take_snapshot(args, choose_checks("full"), args.timeout)
    name = snapshot.nodes[0].address
    return _common_files(snapshot) | _node_files(name, decode_files(collect_files(args.megabytes << 20)))


def _collect_cluster(args: argparse.Namespace) -> dict[str, str]:
    connect_as_observer(args.address)
    import ray

    try:
        snapshot = snapshot_of_joined_cluster(choose_checks("full"), args.nodes, args.timeout)
        topology = _attempt(collect_topology)
        wanted = {record.address for record in snapshot.nodes} | {failure.address for failure in snapshot.failures}
        arguments = {
            node_id: (args.megabytes << 20, _pids_on(topology, node_id))
            for node_id, address in live_node_addresses().items()
            if address in wanted
        }
        names = _folder_names(live_node_addresses())
        found = run_on_nodes(collect_files, decode_files, arguments, args.timeout)
    finally:
        ray.shutdown()
    files = _common_files(snapshot) | _part("topology.txt", topology, _topology_files)
    for node_id, answer in found.answers.items():
        files |= _node_files(names[node_id], answer.value)
    for node_id, reason in found.failures.items():
        print(f"node {names[node_id]} sent nothing: {reason}", file=sys.stderr)
        files[f"{_NODES}{names[node_id]}/missing.txt"] = redact_text(f"{reason}\n")
    return files


def _attempt(make: Callable[[], T]) -> T | _Failed:
    try:
        return make()
    except Exception:  # noqa: BLE001  whatever fails, the rest of the bundle is wanted all the more
        return _Failed(traceback.format_exc())


def _part(name: str, made: T | _Failed, files_of: Callable[[T], dict[str, str]]) -> dict[str, str]:
    """Return the files of a part of the bundle; where it failed, ``name`` alone, which says why."""
    return {name: made.traceback} if isinstance(made, _Failed) else files_of(made)


def _topology_files(topology: Topology) -> dict[str, str]:
    return {"topology.txt": "\n".join(format_lines(topology)) + "\n", "topology.json": _as_json(topology)}


def _pids_on(topology: Topology | _Failed, node_id: str) -> list[int]:
    """Return the processes of engines on a node: workers, and the engine core or driver."""
    if isinstance(topology, _Failed):
        return []
    ranks = [rank.pid for engine in topology.engines for rank in engine.ranks if rank.node_id == node_id]
    return ranks + [engine.pid for engine in topology.engines if engine.node_id == node_id]


def _folder_names(addresses: Mapping[str, str]) -> dict[str, str]:
    """Return a folder for each node, by Ray's id: its address, with the id where several nodes have the address."""
    values = list(addresses.values())
    return {
        node_id: address if values.count(address) == 1 else f"{address}-{node_id[:8]}"
        for node_id, address in addresses.items()
    }


def _node_files(folder: str, texts: Mapping[str, str]) -> dict[str, str]:
    return {f"{_NODES}{folder}/{name}": text for name, text in texts.items()}


def _common_files(snapshot: Snapshot) -> dict[str, str]:
    """Return what is there once: doctor's report and data, switches and variables of this process, versions."""
    return {
        "README.txt": _README.format(version=__version__, time=time.strftime("%Y-%m-%d %H:%M:%S %z")),
        "snapshot.json": _as_json(snapshot),
        "versions.json": _as_json({node.address: node.versions for node in snapshot.nodes}),
        **_part("doctor.txt", _attempt(lambda: make_report(snapshot, choose_checks("full"))), _report_files),
        **_part("environment.txt", _attempt(_environment), lambda text: {"environment.txt": text}),
    }


def _report_files(report: Report) -> dict[str, str]:
    return {"doctor.txt": "\n".join(format_report(report)) + "\n", "doctor.json": _as_json(report)}


def _environment() -> str:
    switches = "\n".join(f"{each.variable}={each.value}" for each in list_switches())
    variables = "\n".join(
        f"{each.variable}={each.value}" for each in list_variables(os.environ) if each.value is not None
    )
    return f"# switches of this plugin\n{switches}\n\n# known variables of this process\n{variables}\n"


def _as_json(values: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(values)).decode() + "\n"


def _write_archive(path: Path, files: Mapping[str, str]) -> None:
    """Write a compressed archive that its owner alone may read. Raise DoctorError where that is not possible."""
    folder = path.name.partition(".")[0]
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, text in sorted(files.items()):
                content = text.encode(errors="replace")  # bytes of a variable may be no text
                entry = tarfile.TarInfo(f"{folder}/{name}")
                entry.size, entry.mtime = len(content), int(time.time())
                archive.addfile(entry, io.BytesIO(content))
    except OSError as error:
        raise DoctorError("VRA-607", f"{path} cannot be written ({error}). Give --output another FILE.") from error


_README = """vllm-ray-ascend {version}, support bundle of {time}

doctor.txt, doctor.json    findings of `vllm-ray-ascend doctor --level full`
snapshot.json              all that doctor collected: `vllm-ray-ascend doctor --compare snapshot.json` compares
versions.json              packages of each node
environment.txt            switches and known variables of the process that made the bundle
topology.txt, .json        nodes, NPUs, engines and ranks
nodes/ADDRESS/ray          ends of the logs of Ray's processes, workers included
nodes/ADDRESS/plog         ends of CANN's logs of the engines' processes, if there are any
nodes/ADDRESS/failures     records of the last failures: first cause, what each rank said last; none without failures
nodes/ADDRESS/missing.txt  why a node sent nothing

A part that could not be made has a file that says why. Three asterisks stand for what may be a secret.
Names and addresses of hosts, and paths, are not hidden.
"""
