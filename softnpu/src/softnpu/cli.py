"""``softnpu``: run commands, or a whole Ray cluster, on software NPUs.

Nothing heavy is imported at the top: `exec`, `build` and `status` work without Ray and vLLM.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from softnpu import __version__
from softnpu.cluster.plan import Cluster, Shape, make_shape, parse_npus
from softnpu.errors import ClusterError, SoftNpuError

if TYPE_CHECKING:
    from softnpu.cluster.manager import NodeStatus

_UNHEALTHY = 1
_USAGE_ERROR = 2
_BROKEN_PIPE = 141  # the exit code that a shell reports for a process killed by SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's) and return the exit code; 2 for a SoftNpuError."""
    args = build_parser().parse_args(argv)
    action: Callable[[argparse.Namespace], int] = args.action
    try:
        code = action(args)
        sys.stdout.flush()
        return code
    except SoftNpuError as error:
        print(f"softnpu: {error}", file=sys.stderr)
        return _USAGE_ERROR
    except BrokenPipeError:  # the reader (`head`) has closed the pipe; Python must not report it again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command."""
    parser = argparse.ArgumentParser(
        prog="softnpu", description="Ascend NPUs emulated on the CPU, for trials and tests"
    )
    parser.add_argument("--version", action="version", version=f"softnpu {__version__}")
    commands = parser.add_subparsers(required=True, metavar="exec|build|status|cluster")
    execute = commands.add_parser("exec", help="run a command with software NPUs")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    execute.set_defaults(action=_exec_command)
    build = commands.add_parser("build", help="compile the libraries and print their folder")
    build.set_defaults(action=_build_libraries)
    status = commands.add_parser("status", help="show which process of this node holds which software NPU")
    status.set_defaults(action=_show_node_table)
    _add_cluster_parser(commands)
    return parser


def _add_cluster_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # Options are accepted before the verb and after it. Those after it have no default, which would undo one before.
    cluster = commands.add_parser(
        "cluster", help="a local Ray cluster of software-NPU nodes (needs Ray)", allow_abbrev=False
    )
    _add_shape_options(cluster, keep_default=True)
    verbs = cluster.add_subparsers(dest="verb", required=True, metavar="up|status|down|exec")
    for verb, action, text in (
        ("up", _start_cluster, "make the cluster, or find it already up"),
        ("status", _show_cluster, "show nodes, addresses, NPUs; exit code 1 when a node is dead"),
        ("down", _remove_cluster, "remove the cluster and everything that belongs to it"),
        ("exec", _exec_on_node, "run a command on a node, by default the head"),
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

    add("--name", str, "default", "name of the cluster; several can be up simultaneously")
    add("--nodes", int, Shape.nodes, "number of nodes")
    add("--npus-per-node", parse_npus, Shape.npus_per_node, "software NPUs of each node, or one number a node: 0,2,2")
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
    parser.add_argument(
        "--dashboard",
        action="store_true",
        default=False if keep_default else argparse.SUPPRESS,
        help="with Ray's dashboard, for `ray job`; needs the packages of ray[default]",
    )


def _build_libraries(args: argparse.Namespace) -> int:
    from softnpu.build import build_libraries

    print(build_libraries())
    return 0


def _show_node_table(args: argparse.Namespace) -> int:
    from softnpu.node_table import read_node_table

    print("    PID  NPU  MEMORY (MiB)  STREAMS  COMMUNICATORS OF THE PROCESS")
    for used in read_node_table():
        print(f"{used.pid:7}  {used.physical:3}  {used.memory / 2**20:12.1f}  {used.streams:7}  {used.communicators}")
    return 0


def _exec_command(args: argparse.Namespace) -> int:
    from softnpu.activate import make_environment

    _replace_process(_get_command(args), make_environment(os.environ))


def _start_cluster(args: argparse.Namespace) -> int:
    from softnpu.cluster import manager

    manager.require_ray()
    kind, reason = manager.choose_node_kind()
    if args.plain:
        kind = "plain"
    elif reason:
        print(f"nodes share the address 127.0.0.1: {reason}")
    shape = make_shape(args.nodes, args.npus_per_node, args.cpus_per_node, args.memory, kind, args.dashboard)
    cluster, created = manager.up(args.name, shape, subnet=args.subnet, settings=_parse_node_settings(args.node_env))
    if not created:
        print(f"cluster {args.name!r} is already up")
    _print_nodes(cluster, manager.status(args.name)[1])
    option = "" if args.name == "default" else f" --name {args.name}"
    print(f"\nRAY_ADDRESS={cluster.ray_address}")
    print(f"on the head node:      softnpu cluster exec{option} -- COMMAND")
    print(f"to remove the cluster: softnpu cluster down{option}")
    return 0


def _show_cluster(args: argparse.Namespace) -> int:
    from softnpu.cluster import manager

    cluster, nodes = manager.status(args.name)
    if args.json:
        print(json.dumps({**cluster.to_json(), "nodes": [dataclasses.asdict(node) for node in nodes]}, indent=1))
    else:
        _print_nodes(cluster, nodes)
    return 0 if all(node.alive for node in nodes) else _UNHEALTHY


def _remove_cluster(args: argparse.Namespace) -> int:
    from softnpu.cluster import manager

    print(f"cluster {args.name!r} {'removed' if manager.down(args.name) else 'is not up'}")
    return 0


def _exec_on_node(args: argparse.Namespace) -> int:
    from softnpu.cluster import manager

    cluster = manager.find_cluster(args.name)
    command = manager.node_command(cluster, args.node, _get_command(args))
    _replace_process(command, manager.command_environment(cluster, args.node, os.environ))


def _print_nodes(cluster: Cluster, nodes: list[NodeStatus]) -> None:
    print(f"cluster {cluster.name!r}, Ray at {cluster.ray_address}")
    for node in nodes:
        state = "alive" if node.alive else f"dead: {node.reason}"
        resources = ", ".join(f"{key} {value:g}" for key, value in sorted(node.resources.items()) if ":" not in key)
        print(f"  {node.index}  {node.hostname}  {node.address}  NPUs {node.npus}  {state}  ({resources or 'unknown'})")


def _parse_node_settings(entries: list[str]) -> dict[int, dict[str, str]]:
    settings: dict[int, dict[str, str]] = {}
    for entry in entries:
        index, colon, assignment = entry.partition(":")
        variable, equals, value = assignment.partition("=")
        if not (colon and equals and variable and index.isdigit()):
            raise ClusterError(f"--node-env {entry!r} is not N:NAME=VALUE, such as 2:ASCEND_RT_VISIBLE_DEVICES=4,5.")
        settings.setdefault(int(index), {})[variable] = value
    return settings


def _get_command(args: argparse.Namespace) -> list[str]:
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


if __name__ == "__main__":
    sys.exit(main())
