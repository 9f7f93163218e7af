"""``vllm-ray-ascend softnpu``: run commands, or a whole Ray cluster, on software NPUs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn

from vllm_ray_ascend.softnpu.cluster.plan import Cluster, ClusterError, Shape

if TYPE_CHECKING:
    from vllm_ray_ascend.softnpu.cluster.manager import NodeStatus

_UNHEALTHY = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its subcommands."""
    parser = subparsers.add_parser("softnpu", help="software NPUs: NPUs emulated on the CPU, for trials and tests")
    parser.set_defaults(func=run)
    commands = parser.add_subparsers(dest="softnpu_command", required=True, metavar="COMMAND")
    commands.add_parser("build", help="compile the libraries of the software NPU").set_defaults(action=_build)
    commands.add_parser("status", help="which process of this node holds which software NPU").set_defaults(
        action=_holdings
    )
    execute = commands.add_parser("exec", help="run a command with software NPUs")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    execute.set_defaults(action=_exec)
    _add_cluster_parser(commands)


def run(args: argparse.Namespace) -> int:
    """Exit code of the subcommand. Raises VllmRayAscendError for what the user can mend."""
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


def _add_cluster_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # Options are accepted before the verb and after it. Those after it have no default, lest it undo one before.
    cluster = commands.add_parser("cluster", help="a local Ray cluster of software-NPU nodes", allow_abbrev=False)
    _add_shape_options(cluster, keep_default=True)
    verbs = cluster.add_subparsers(dest="verb", required=True, metavar="up|status|down|exec")
    for verb, action, text in (
        ("up", _up, "make the cluster, or find it already up"),
        ("status", _status, "nodes, addresses, NPUs; exit code 1 when a node is dead"),
        ("down", _down, "remove the cluster and everything that belongs to it"),
        ("exec", _cluster_exec, "run a command on a node, the head unless --node says otherwise"),
    ):
        parser = verbs.add_parser(verb, help=text, allow_abbrev=False)
        _add_shape_options(parser, keep_default=False)
        parser.set_defaults(action=action)
        if verb == "status":
            parser.add_argument("--json", action="store_true", help="print JSON")
        if verb == "exec":
            parser.add_argument("--node", type=int, default=1, metavar="N", help="node, counted from 1 (the head)")
            parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")


def _add_shape_options(parser: argparse.ArgumentParser, *, keep_default: bool) -> None:
    cpus = max(1, min(8, os.cpu_count() or 1))

    def add(option: str, kind: Callable[[str], object], default: object, text: str) -> None:
        shown = "" if default is None else f" (default {default})"
        value = default if keep_default else argparse.SUPPRESS
        parser.add_argument(option, type=kind, default=value, metavar=option[2:].upper(), help=text + shown)

    add("--name", str, "default", "name of the cluster; several can be up at once")
    add("--nodes", int, Shape.nodes, "number of nodes")
    add("--npus-per-node", int, Shape.npus_per_node, "software NPUs of each node")
    add("--cpus-per-node", int, cpus, "CPUs that Ray counts on each node")
    add("--memory", str, Shape.memory, "memory of each software NPU")
    add("--subnet", str, None, "network of the nodes' addresses, such as 10.77.5.0/24")
    parser.add_argument(
        "--node-env",
        action="append",
        default=[] if keep_default else argparse.SUPPRESS,
        metavar="N:NAME=VALUE",
        help="environment variable of the Ray processes of node N; may be repeated",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        default=False if keep_default else argparse.SUPPRESS,
        help="nodes without addresses of their own: several raylets on 127.0.0.1 (always so unless root)",
    )


def _build(args: argparse.Namespace) -> int:
    from vllm_ray_ascend.softnpu.build import build

    print(build())
    return 0


def _holdings(args: argparse.Namespace) -> int:
    from vllm_ray_ascend.softnpu.table import holdings

    print("    PID  NPU  MEMORY (MiB)  STREAMS  COMMUNICATORS OF THE PROCESS")
    for held in holdings():
        print(f"{held.pid:7}  {held.physical:3}  {held.memory / 2**20:12.1f}  {held.streams:7}  {held.communicators}")
    return 0


def _exec(args: argparse.Namespace) -> int:
    from vllm_ray_ascend.softnpu.activate import environment

    _replace_process(_command_of(args), environment(os.environ))


def _up(args: argparse.Namespace) -> int:
    from vllm_ray_ascend.softnpu.cluster import manager

    kind, reason = manager.best_kind()
    if args.plain:
        kind = "plain"
    elif reason:
        print(f"nodes share the address 127.0.0.1: {reason}")
    shape = Shape(args.nodes, args.npus_per_node, args.cpus_per_node, args.memory, kind)
    cluster, created = manager.up(args.name, shape, subnet=args.subnet, settings=_settings_of(args.node_env))
    if not created:
        print(f"cluster {args.name!r} is already up")
    _print_nodes(cluster, manager.status(args.name)[1])
    option = "" if args.name == "default" else f" --name {args.name}"
    print(f"\nRAY_ADDRESS={cluster.ray_address}")
    print(f"on the head node:   vllm-ray-ascend softnpu cluster exec{option} -- COMMAND")
    print(f"to end the cluster: vllm-ray-ascend softnpu cluster down{option}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from vllm_ray_ascend.softnpu.cluster import manager

    cluster, nodes = manager.status(args.name)
    if args.json:
        print(json.dumps({**cluster.to_json(), "nodes": [dataclasses.asdict(node) for node in nodes]}, indent=1))
    else:
        _print_nodes(cluster, nodes)
    return 0 if all(node.alive for node in nodes) else _UNHEALTHY


def _down(args: argparse.Namespace) -> int:
    from vllm_ray_ascend.softnpu.cluster import manager

    print(f"cluster {args.name!r} {'removed' if manager.down(args.name) else 'is not up'}")
    return 0


def _cluster_exec(args: argparse.Namespace) -> int:
    from vllm_ray_ascend.softnpu.cluster import manager

    cluster = manager.find(args.name)
    command = manager.node_command(cluster, args.node, _command_of(args))
    _replace_process(command, manager.command_environment(cluster, args.node, os.environ))


def _print_nodes(cluster: Cluster, nodes: list[NodeStatus]) -> None:
    print(f"cluster {cluster.name!r}, Ray at {cluster.ray_address}")
    for node in nodes:
        state = "alive" if node.alive else f"dead: {node.reason}"
        resources = ", ".join(f"{key} {value:g}" for key, value in sorted(node.resources.items()) if ":" not in key)
        print(f"  {node.index}  {node.hostname}  {node.address}  NPUs {node.npus}  {state}  ({resources or 'unknown'})")


def _settings_of(entries: list[str]) -> dict[int, dict[str, str]]:
    settings: dict[int, dict[str, str]] = {}
    for entry in entries:
        index, colon, assignment = entry.partition(":")
        variable, equals, value = assignment.partition("=")
        if not (colon and equals and variable and index.isdigit()):
            raise ClusterError(f"--node-env {entry!r} is not N:NAME=VALUE, such as 2:ASCEND_RT_VISIBLE_DEVICES=4,5.")
        settings.setdefault(int(index), {})[variable] = value
    return settings


def _command_of(args: argparse.Namespace) -> list[str]:
    command: list[str] = args.command
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise ClusterError("no command given: write it after --, as in: softnpu exec -- python script.py")
    return command


def _replace_process(command: list[str], environment: Mapping[str, str]) -> NoReturn:
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        raise ClusterError(f"cannot run {command[0]!r}: {error.strerror}.") from None
