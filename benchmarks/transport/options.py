"""What one run of the transport benchmark measures."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

EMPTY = {"graph-hccl": "graph-empty", "direct": "direct-empty"}
"""Ways of ours, each with the same way where nothing is transferred: what Ray costs in it."""
WAYS = ("raw", "group", "graph-hccl", "graph-host", "direct", "ray-ascend", "object-store")
"""torch.distributed's send and recv over HCCL, which every ratio is over; our Group; a compiled graph over HCCL (our
HcclCommunicator) and over host memory (Ray's own); our direct transport; ray-ascend's; and Ray's object store."""
BASE = "raw"
KIB, MIB = 1 << 10, 1 << 20
SIZES = tuple(KIB * 4**power for power in range(1, 10))
"""Bytes of a tensor: 4 KiB to 256 MiB."""
HOPS = 4
"""Hops of a tensor in one execution of a compiled graph: the driver's part of it is outside of what is measured."""
_MOST_COUNT, _LEAST_COUNT = 40, 3
_BYTES_A_TURN = 64 * MIB


@dataclasses.dataclass(frozen=True)
class Case:
    """Where the two NPUs are. ``tcp``: on two nodes, so that all goes over TCP."""

    name: str
    tcp: bool


CASES = {case.name: case for case in (Case("one-node", tcp=False), Case("two-nodes", tcp=True))}


@dataclasses.dataclass(frozen=True)
class Options:
    """``ray_ascend`` is a folder with ray-ascend in it, empty where that way is left out."""

    cases: tuple[str, ...] = tuple(CASES)
    ways: tuple[str, ...] = WAYS
    sizes: tuple[int, ...] = SIZES
    rounds: int = 8
    ray_ascend: str = ""
    name: str = "transport"


def count_of(size: int) -> int:
    """Return the hops of one turn."""
    return max(_LEAST_COUNT, min(_MOST_COUNT, _BYTES_A_TURN // size))


def label(size: int) -> str:
    """Return the name of a size."""
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def read_options(arguments: Sequence[str]) -> Options:
    """Parse the command line. --quick is a smoke run."""
    default = Options()
    if "--quick" in arguments:
        default = dataclasses.replace(
            default, cases=("one-node",), sizes=(4 * KIB, MIB, 16 * MIB), rounds=2, name="transport-quick"
        )
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one case, few sizes and rounds")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default.cases)
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, *EMPTY.values()), default=default.ways)
    parser.add_argument("--sizes", nargs="+", type=int, default=default.sizes, metavar="BYTES")
    parser.add_argument("--rounds", type=int, default=default.rounds, metavar="N", help="each visits all")
    parser.add_argument(
        "--ray-ascend", default="", metavar="FOLDER", help="of `pip install --no-deps --target FOLDER ray-ascend`"
    )
    parser.add_argument("--name", default=default.name, help="of the files in benchmarks/results")
    given = vars(parser.parse_args(arguments))
    del given["quick"]
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return dataclasses.replace(default, **{**given, **lists})
