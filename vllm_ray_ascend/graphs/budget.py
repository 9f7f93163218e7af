"""An estimate of the streams that a capture takes. Pure.

vllm-ascend trimmed its sizes by such a formula until 0.23 (`update_aclgraph_sizes`), which left pipeline groups out and
has gone, since newer drivers capture more. Its core stays: for as long as it lives, a graph holds a stream, and for
each communicator that it uses one (where AI vector cores carry HCCL: HCCL_OP_EXPANSION_MODE=AIV) or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vllm_ray_ascend.graphs.ladder import spread

_FALLBACK, _OF_A_GROUP = 1800, 40
"""vllm-ascend's figures for a driver that does not tell: streams for graphs, and what a communicator takes of them."""


class Load(NamedTuple):
    """What is to be captured: batches as whole graphs, batches in pieces, and what stands behind each."""

    whole: int
    in_pieces: int
    layers: int
    groups: int
    on_vector_cores: bool = False


def streams(load: Load) -> int:
    """Streams that the graphs of ``load`` take. In pieces, a batch is a graph for each layer and one more."""
    graphs = load.whole + load.in_pieces * (load.layers + 1)
    return graphs * (1 + load.groups * (1 if load.on_vector_cores else 2))


def assumed(groups: int) -> int:
    """Free streams where the driver does not tell, beside ``groups`` communicators, those of pipelines among them."""
    return max(0, _FALLBACK - _OF_A_GROUP * groups)


def fit(sizes: Sequence[int], needed: int, available: int) -> tuple[int, ...]:
    """As many of ``sizes`` as ``available`` streams allow where all take ``needed``; never none, to have one try."""
    if needed <= available:
        return tuple(sizes)
    return spread(sizes, max(1, len(sizes) * max(available, 0) // needed))
