"""HCCL between pairs of nodes (`doctor --deep`): which pairs, and what their times mean. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence

from vllm_ray_ascend.cluster.findings import Finding, Severity
from vllm_ray_ascend.doctor.records import Link

SLOW_FACTOR = 3.0
"""How many times longer than the median a pair's transfer takes that is reported."""
_FEW_PAIRS = 3
_CHECK = "hccl-links"


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return the pairs of ``count`` nodes, in rounds in which each node has at most one partner.

    Round r pairs numbers that differ in bit r alone: log2 rounds, in which each node meets nodes near and far. A node
    or a switch with a fault is in several of the pairs that fail.
    """
    found = [
        [(node, node ^ bit) for node in range(count) if not node & bit and node ^ bit < count]
        for bit in (1 << position for position in range(max(count - 1, 0).bit_length()))
    ]
    return [pairs for pairs in found if pairs]


def judge_links(links: Sequence[Link], busy: Collection[str] = ()) -> Iterator[Finding]:
    """Yield the findings of pairs that failed or are slow, and of nodes whose NPUs were in use."""
    for link in links:
        if link.error:
            yield _finding(
                link,
                "error",
                "VRA-690",
                f"HCCL between it and NPU {link.second_physical_id} of {link.second} fails: {link.error}.",
                "Where one node is in several failing pairs, it is that one: `vllm-ray-ascend doctor --level full` "
                "looks at its ports, TLS, MTU and pings.",
            )
    yield from _slow(links)
    for address in sorted(busy):
        text = "its NPUs are in use, or Ray gave none within the limit: HCCL was not tested there."
        remedy = "Stop what uses them (`vllm-ray-ascend topology`) and run `vllm-ray-ascend doctor --deep` again."
        yield Finding(address, "unknown", "VRA-692", text, remedy, check=_CHECK)


def _slow(links: Sequence[Link]) -> Iterator[Finding]:
    for name in ("all_reduce_s", "send_s", "receive_s"):
        timed = [(link, getattr(link, name)) for link in links if not link.error]
        if len(timed) < _FEW_PAIRS:
            continue  # nothing to compare with
        median = statistics.median(seconds for _, seconds in timed)
        for link, seconds in timed:
            if seconds > SLOW_FACTOR * median:
                yield _finding(
                    link,
                    "warning",
                    "VRA-691",
                    f"HCCL's {name.removesuffix('_s').replace('_', '-')} with NPU {link.second_physical_id} of "
                    f"{link.second} takes {seconds * 1000:.1f} ms, of {len(timed)} pairs the median is "
                    f"{median * 1000:.1f} ms.",
                    f"`sudo hccn_tool -i {link.first_physical_id} -speed -g`, `-stat -g` and `-lldp -g` show port, "
                    "errors and switch; compare with another node.",
                )


def _finding(link: Link, severity: Severity, code: str, text: str, remedy: str) -> Finding:
    values = {"second": link.second, "second_physical_id": link.second_physical_id}
    return Finding(link.first, severity, code, text, remedy, link.first_physical_id, _CHECK, values)
