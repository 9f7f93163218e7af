"""``vllm-ray-ascend doctor``: what is wrong with the nodes of a Ray cluster, each finding with its remedy."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vllm_ray_ascend.cluster.connect import connect_as_observer
from vllm_ray_ascend.doctor.checks import CHECKS
from vllm_ray_ascend.doctor.checks.model import MODEL
from vllm_ray_ascend.doctor.checks.network import PING
from vllm_ray_ascend.doctor.deep import run_link_tests
from vllm_ray_ascend.doctor.gather import snapshot_of_cluster, snapshot_of_this_node
from vllm_ray_ascend.doctor.judge import EXIT_CODES, checks_of_full_level, choose_checks, make_report
from vllm_ray_ascend.doctor.queries import model_command
from vllm_ray_ascend.doctor.records import Level, Report, Snapshot
from vllm_ray_ascend.doctor.text import format_report
from vllm_ray_ascend.doctor.views import Check
from vllm_ray_ascend.errors import DoctorError, VllmRayAscendError

_LIMITS_S: dict[Level, float] = {"quick": 30.0, "full": 90.0}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check every node of a Ray cluster: driver, CANN, NPUs, network, hosts",
        epilog="Exit codes: 0 all is well, 1 a warning, 2 an error, 3 something could not be checked. Checks: "
        f"{', '.join(CHECKS)}.",
    )
    parser.add_argument("--address", default="auto", help="the Ray cluster's address (default: that of this node)")
    parser.add_argument("--local", action="store_true", help="this node alone, without Ray")
    parser.add_argument(
        "--nodes", type=parse_names, default=[], metavar="A,B", help="only these: addresses or host names"
    )
    parser.add_argument("--checks", type=parse_names, default=[], metavar="X,Y", help="only these checks, of any level")
    parser.add_argument("--skip", type=parse_names, default=[], metavar="X,Y", help="without these checks")
    parser.add_argument(
        "--model",
        type=_parse_path,
        default="",
        metavar="PATH",
        help="also: this model's folder is on every node, and the same",
    )
    parser.add_argument(
        "--level",
        choices=list(_LIMITS_S),
        default="quick",
        help="quick (default): seconds; full: also each RoCE port's statistics, temperatures. Neither changes anything",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help="level full, and HCCL between the nodes: takes a free NPU of each for some seconds, never a busy one",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, by the schema of docs/doctor.schema.json")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all that was collected to FILE, as JSON")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="show what has changed since a saved FILE")
    parser.add_argument(
        "--timeout", type=_seconds, metavar="S", help="seconds for all nodes (default: 30; level full: 90)"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the report and return its exit code; 3 as well where nothing could be checked at all."""
    try:
        report, before = _examine(args)
    except VllmRayAscendError as error:
        print(f"vllm-ray-ascend: {error}", file=sys.stderr)
        return EXIT_CODES["unknown"]
    except Exception:  # noqa: BLE001  Python's own exit code, 1, would be a warning
        traceback.print_exc()
        return EXIT_CODES["unknown"]
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        is_terminal = sys.stdout.isatty()
        lines = format_report(
            report,
            colours=is_terminal and not os.environ.get("NO_COLOR"),
            is_terminal=is_terminal,
            not_made=checks_of_full_level(report.checks)
            if args.level == "quick" and not (args.checks or args.deep)
            else (),
            compared_at=before.time if before else None,
        )
        print("\n".join(lines))
    return report.exit_code


def _examine(args: argparse.Namespace) -> tuple[Report, Snapshot | None]:
    """Return the report, and the snapshot with which it was compared, if any."""
    if args.deep and args.local:
        raise DoctorError("VRA-609", "--deep tests HCCL between nodes, for which Ray assigns NPUs: leave out --local.")
    if args.model and not os.path.isabs(args.model):
        raise DoctorError(
            "VRA-697",
            f"--model {args.model} is no absolute path, which nodes need. Of a model that each of them takes from "
            "Hugging Face by its name, give the folder below its HF_HOME.",
        )
    level: Level = "full" if args.deep else args.level
    checks = choose_checks(level, args.checks, args.skip, with_model=bool(args.model))
    before = read_snapshot(args.compare) if args.compare else None
    if args.save:
        _check_writable(args.save)  # before anything is collected for it
    snapshot = take_snapshot(args, checks, args.timeout, args.model, deep=args.deep)
    if args.save:
        _save(snapshot, args.save)
    return make_report(snapshot, checks, before), before


def take_snapshot(
    args: argparse.Namespace, checks: Sequence[Check], timeout_s: float | None, model: str = "", *, deep: bool = False
) -> Snapshot:
    """Collect what the checks ask for, no more, of the nodes that the options ``args`` name."""
    if args.local:
        level, commands = _demand(checks, model)
        return snapshot_of_this_node(level, commands, timeout_s or _LIMITS_S[level])
    connect_as_observer(args.address)  # which names the remedy where Ray is not installed
    import ray

    try:
        snapshot = snapshot_of_joined_cluster(checks, args.nodes, timeout_s, model)
        if not deep:
            return snapshot
        links, busy = run_link_tests([record.address for record in snapshot.nodes])
        return msgspec.structs.replace(snapshot, links=links, busy=busy)
    finally:
        ray.shutdown()


def snapshot_of_joined_cluster(
    checks: Sequence[Check], nodes: Sequence[str] = (), timeout_s: float | None = None, model: str = ""
) -> Snapshot:
    """Collect what the checks ask for on all nodes of the joined cluster, or on those of ``nodes``."""
    level, commands = _demand(checks, model)
    with_pings = any(check.name == PING for check in checks)
    return snapshot_of_cluster(level, commands, timeout_s or _LIMITS_S[level], nodes, with_pings=with_pings)


def _demand(checks: Sequence[Check], model: str = "") -> tuple[Level, list[str]]:
    """Return the level of ``checks``, and the commands that they need, with what else is collected on demand.

    ``model`` is the path of the model to look at, if any, where its check is made.
    """
    level: Level = "full" if any(check.level == "full" for check in checks) else "quick"
    demanded = (name for check in checks for name in (*(query.command for query in check.queries), *check.also))
    with_model = bool(model) and any(check.name == MODEL for check in checks)
    return level, [*dict.fromkeys(demanded), *([model_command(model)] if with_model else [])]


def read_snapshot(path: Path) -> Snapshot:
    """Return a saved snapshot. Raise DoctorError where the file has none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Snapshot)
    except (OSError, msgspec.MsgspecError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DoctorError(
            "VRA-605", f"{path} is no snapshot of doctor ({reason}). `vllm-ray-ascend doctor --save {path}` writes one."
        ) from error


def _check_writable(path: Path) -> None:
    try:
        path.open("ab").close()
    except OSError as error:
        raise DoctorError(
            "VRA-606", f"{path} cannot be written ({error.strerror}). Give --save another FILE."
        ) from error


def _save(snapshot: Snapshot, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(snapshot)))


def parse_names(text: str) -> list[str]:
    """Return the names in a list with commas. Raise ArgumentTypeError where there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("no name is given")
    return names


def _parse_path(text: str) -> str:
    """Return a path without the slash at its end, which for rsync means what is in the folder."""
    return text.rstrip("/") or text[:1]


def _seconds(text: str) -> float:
    seconds = float(text)
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return seconds
