"""Which node an address or a name means, and the address at which data parallel ranks meet. Pure but for resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vllm_ray_ascend.addresses import canonical, is_loopback, is_same, resolve
from vllm_ray_ascend.errors import PlacementError

Resolver = Callable[[str], Sequence[str]]


def resolve_rendezvous(given: str, resolver: Resolver = resolve) -> str:
    """Return the address that ``given``, an address or a name, means. Raises PlacementError where there is none."""
    found = resolver(given)
    if not found:
        raise PlacementError(
            "VRA-281",
            f"--data-parallel-address {given} is no address, and this node cannot resolve it as a name "
            f"(`getent hosts {given}`). Give an address, or add the name to /etc/hosts or to DNS.",
        )
    return found[0]


def choose_master_address(
    given: str, own: str, interfaces: Iterable[str], others: Iterable[str], resolver: Resolver = resolve
) -> str:
    """Return the address at which data parallel ranks over Ray meet: one of this node that all nodes can reach.

    ``given`` is --data-parallel-address or VLLM_HOST_IP, an address or a name of this node, or empty; ``own`` is Ray's
    address of this node, ``interfaces`` are all of its addresses, ``others`` Ray's addresses of the other nodes. An
    address of an interface is kept; for a loopback address, or none, there is Ray's. Raises PlacementError for an
    address of another node, or of none.
    """
    here = {canonical(address) for address in interfaces}
    if not is_loopback(own) and canonical(own) not in here:
        raise PlacementError(
            "VRA-282",
            f"Ray's address of this node is {own}, which no interface here has ({', '.join(sorted(here))}): data "
            "parallel ranks of other nodes could not connect. `ray stop` here, then `ray start ... "
            "--node-ip-address=ADDRESS` with one of them that the other nodes reach.",
        )
    if not given:
        return own
    resolve_rendezvous(given, resolver)  # raises for a name that nobody knows
    found = list(resolver(given))
    if any(is_same(address, own) or is_loopback(address) for address in found):
        return own
    kept = [address for address in found if canonical(address) in here]
    if kept:
        return kept[0]
    node = next((address for address in found if canonical(address) in set(map(canonical, others))), "")
    whose = f"is Ray's node {node}, not this one" if node else f"is no address of this node ({', '.join(sorted(here))})"
    remedy = f"run `vllm serve` on {node}, or leave" if node else "leave"
    raise PlacementError(
        "VRA-283",
        f"--data-parallel-address (or VLLM_HOST_IP) {given} {whose}: the ranks meet where `vllm serve` runs, which "
        f"Ray knows as {own}. To fix it, {remedy} it out: Ray's address is then used.",
    )


def find_nodes(entries: Iterable[str], rows: Sequence[Mapping[str, Any]], resolver: Resolver = resolve) -> set[str]:
    """Return Ray's addresses of the nodes that ``entries`` name, by address or host name; others as they are given.

    ``rows`` are those of `ray.nodes()`.
    """
    return {address for entry in entries for address in _addresses_of(entry, rows, resolver)}


def _addresses_of(entry: str, rows: Sequence[Mapping[str, Any]], resolver: Resolver) -> set[str]:
    live = [row for row in rows if row.get("Alive")]
    direct = {str(row["NodeManagerAddress"]) for row in live if _is_named(row, entry)}
    if direct:
        return direct
    found = set(map(canonical, resolver(entry)))
    resolved = {str(row["NodeManagerAddress"]) for row in live if canonical(row["NodeManagerAddress"]) in found}
    return resolved or {entry}


def _is_named(row: Mapping[str, Any], entry: str) -> bool:
    names = (row.get("NodeManagerAddress"), row.get("NodeManagerHostname"), row.get("NodeName"))
    return any(name and is_same(str(name), entry) for name in names)
