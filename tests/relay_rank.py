"""A process that is one rank of a queue with relays. It prints a line for each message, and one for the last error.

Its standard input has one line of JSON: the writer's address, the relays, and its rank.
"""

from __future__ import annotations

import hashlib
import sys

import msgspec

from vllm_ray_ascend.ipc.relay import Relay, open_reader
from vllm_ray_ascend.ipc.sockets import Address


class Plan(msgspec.Struct):
    """What a process has to know."""

    address: Address
    relays: list[Relay]
    rank: int


def digest(parts: list[bytes]) -> str:
    """Return a text that two messages share only where their parts are equal."""
    return " ".join(f"{len(part)}:{hashlib.sha256(part).hexdigest()[:16]}" for part in parts)


def main() -> None:
    """Read until an end is gone."""
    plan = msgspec.json.decode(sys.stdin.readline(), type=Plan)
    reader = open_reader(plan.address, plan.relays, plan.rank)
    print("open", flush=True)
    sys.stdin.readline()
    try:
        while True:
            print(digest([bytes(part) for part in reader.recv_multipart()]), flush=True)
    except OSError as error:
        print(f"{type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
