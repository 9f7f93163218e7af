"""An estimate of the streams that a capture takes. Pure.

vllm-ascend trimmed its sizes by such a formula until 0.23 (`update_aclgraph_sizes`), which left pipeline groups out and
has gone, since newer drivers capture more. What is left of it: a graph holds a stream, and one more for each
communicator that it uses, for as long as it lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_ray_ascend.graphs.ladder import spread

FALLBACK = 1800
"""Streams for graphs where the driver does not tell: vllm-ascend's own figure, of 2048."""


class Load(NamedTuple):
    """What is to be captured: batches as whole graphs, batches in pieces, and what stands behind each."""

    whole: int
    in_pieces: int
    layers: int
    groups: int


def streams(load: Load) -> int:
    """Streams that the graphs of ``load`` take. In pieces, a batch is a graph for each layer and one more."""
    return (load.whole + load.in_pieces * (load.layers + 1)) * (1 + load.groups)


def fit(sizes: Sequence[int], needed: int, available: int) -> tuple[int, ...]:
    """As many of ``sizes`` as ``available`` streams allow where all take ``needed``; never none, to have one try."""
    if needed <= available:
        return tuple(sizes)
    return spread(sizes, max(1, len(sizes) * max(available, 0) // needed))
