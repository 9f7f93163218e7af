"""Which node each rank of an engine goes to: whole tensor parallel groups on a node wherever NPUs allow it. Pure.

The ranks of a tensor parallel group are consecutive, and communicate several times in every layer; pipeline stages
communicate once a step. A group that straddles nodes is the slowest use of a link between nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple


class StraddlingGroup(NamedTuple):
    """A tensor parallel group on several nodes: its ranks, and the node of each."""

    ranks: tuple[int, ...]
    nodes: tuple[str, ...]

    def __str__(self) -> str:
        nodes = ", ".join(dict.fromkeys(self.nodes))
        return f"ranks {', '.join(map(str, self.ranks))} on {nodes}"


def place_groups(free: Mapping[str, int], group_size: int, groups: int, driver: str = "") -> list[str]:
    """Return the node of each of ``groups`` x ``group_size`` ranks, in the order of ranks; none where they do not fit.

    ``free`` are whole free NPUs by node. As many groups as possible lie whole on a node. Where all do, they take as few
    nodes as possible, the ``driver``'s among them if that costs no further node. The others straddle few nodes.
    """
    if sum(free.values()) < group_size * groups:
        return []
    capacity = {node: count // group_size for node, count in free.items() if count >= group_size}
    all_whole = sum(capacity.values()) >= groups
    chosen = _fewest_nodes(capacity, groups, driver) if all_whole else list(capacity)
    placed: list[str] = []
    for node in sorted(chosen, key=lambda node: (node != driver, -capacity[node], node)):
        placed += [node] * min(capacity[node] * group_size, groups * group_size - len(placed))
    return placed + _straddle(free, group_size, groups - len(placed) // group_size, Counter(placed), driver)


def order_bundles(bundle_nodes: Mapping[int, str], group_size: int, groups: int, driver: str = "") -> list[int]:
    """Return the bundles of ``groups`` x ``group_size`` ranks in their order; none where they are too few.

    ``bundle_nodes`` is the node of each bundle that may be used, by its index; the nodes are used as by `place_groups`,
    the bundles of a node in ascending order.
    """
    unused: dict[str, list[int]] = {}
    for index in sorted(bundle_nodes, reverse=True):
        unused.setdefault(bundle_nodes[index], []).append(index)
    free = {node: len(indices) for node, indices in unused.items()}
    return [unused[node].pop() for node in place_groups(free, group_size, groups, driver)]


def rate_placement(nodes: Sequence[str], group_size: int, driver: str) -> tuple[int, int, bool]:
    """Return what is wrong with a placement, so that the smaller is the better: ``nodes`` is the node of each rank.

    These are the groups that straddle nodes, the nodes in use, and whether the driver's is not among them.
    """
    return len(straddling_groups(nodes, group_size)), len(set(nodes)), driver not in nodes


def straddling_groups(nodes: Sequence[str], group_size: int) -> list[StraddlingGroup]:
    """Return each group that does not lie whole on a node; ``nodes`` is the node of each rank."""
    starts = range(0, len(nodes), group_size)
    groups = [StraddlingGroup(tuple(range(i, i + group_size)), tuple(nodes[i : i + group_size])) for i in starts]
    return [group for group in groups if len(set(group.nodes)) > 1]


def _fewest_nodes(capacity: Mapping[str, int], groups: int, driver: str) -> list[str]:
    """Return the fewest nodes that hold ``groups`` whole, the last of them the smallest that will do.

    With n nodes the n - 1 largest leave the least to the last one, which may then be the driver's.
    """
    ordered = sorted(capacity, key=lambda node: (-capacity[node], node != driver, node))
    missing = groups
    for count, node in enumerate(ordered if groups else []):
        if capacity[node] >= missing:
            fitting = [other for other in ordered[count:] if capacity[other] >= missing]
            last = driver if driver in fitting else min(fitting, key=lambda other: (capacity[other], other))
            return [*ordered[:count], last]
        missing -= capacity[node]
    return []


def _straddle(
    free: Mapping[str, int], group_size: int, groups: int, taken: Mapping[str, int], driver: str
) -> list[str]:
    """Return the nodes of ``groups`` that do not fit whole: each from the fullest remainders, then the best fitting."""
    nodes_with: dict[int, list[tuple[bool, str]]] = {}
    """For each number of NPUs that are left, a heap of the nodes with so many: the driver's first, then by name."""
    for key in sorted((node != driver, node) for node in free):
        nodes_with.setdefault(free[key[1]] - taken.get(key[1], 0), []).append(key)
    nodes_with.pop(0, None)
    placed: list[str] = []
    for _ in range(groups):
        missing = group_size
        while missing:
            size = min((size for size in nodes_with if size >= missing), default=max(nodes_with))
            key = heappop(nodes_with[size])
            if not nodes_with[size]:
                del nodes_with[size]
            count = min(size, missing)
            if count < size:
                heappush(nodes_with.setdefault(size - count, []), key)
            missing -= count
            placed += [key[1]] * count
    return placed
