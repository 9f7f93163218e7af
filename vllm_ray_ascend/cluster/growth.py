"""Clusters that grow: what does not fit is posted as a demand where an autoscaler can add nodes, and waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from vllm_ray_ascend.cluster.placement_groups import (
    PlacementGroupSpec,
    post_placement_groups,
    remove_placement_groups,
)
from vllm_ray_ascend.cluster.polling import poll_until
from vllm_ray_ascend.compat.autoscaler import find_autoscaler
from vllm_ray_ascend.errors import ClusterResourceError, ShortageError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import is_set, load

GROWTH_LIMIT_S = 1800.0
"""Seconds for an autoscaler to add nodes where the user has set none: vLLM's PG_WAIT_TIMEOUT."""
_Result = TypeVar("_Result")

logger = get_logger(__name__)


class _Demand(NamedTuple):
    autoscaler: str
    specs: Sequence[PlacementGroupSpec]


def place_with_growth(
    attempt: Callable[[Sequence[Any]], _Result],
    demand: Callable[[], Sequence[PlacementGroupSpec]],
    wait_s: Callable[[], float],
) -> _Result:
    """Return what ``attempt`` returns, once it no longer raises ClusterResourceError or ShortageError.

    Without an autoscaler it is repeated for ``wait_s()`` seconds. With one, the placement groups of ``demand`` are
    created, as vLLM does, and handed to ``attempt``, which counts what they hold as free; they are removed when it has
    succeeded, or failed. Raises the last error of ``attempt``, or ClusterResourceError with it.
    """

    def attempt_or_demand() -> _Result | _Demand:
        try:
            return attempt(())
        except (ClusterResourceError, ShortageError):
            specs = demand()
            autoscaler = find_autoscaler() if specs else ""  # asked again: it reports seconds after the cluster's start
            if not autoscaler:
                raise
            return _Demand(autoscaler, specs)

    try:
        return attempt(())
    except (ClusterResourceError, ShortageError):
        found = poll_until(attempt_or_demand, wait_s())
    return _place_after_growth(attempt, found) if isinstance(found, _Demand) else found


def _place_after_growth(attempt: Callable[[Sequence[Any]], _Result], demand: _Demand) -> _Result:
    limit_s = load().npu_wait_s if is_set("npu_wait_s") else GROWTH_LIMIT_S
    asked = f"{demand.autoscaler} was asked for {format_demand(demand.specs)}"
    logger.info("%s; waiting up to %g s for nodes, which `ray status` shows", asked, limit_s)
    groups = post_placement_groups(demand.specs)
    try:
        return poll_until(lambda: attempt(groups), limit_s, announced=True)
    except (ClusterResourceError, ShortageError) as error:
        raise ClusterResourceError(
            "VRA-259",
            f"{asked}, and has not added enough nodes within {limit_s:g} s. `ray status` shows why: a limit of nodes, "
            "or no node type that has them among its resources. VLLM_RAY_ASCEND_NPU_WAIT_S=SECONDS waits longer. "
            f"{error}",
        ) from error
    finally:
        remove_placement_groups(groups)


def format_demand(specs: Iterable[PlacementGroupSpec]) -> str:
    """Return the bundles of ``specs``, as `ray status` shows them: {'NPU': 1.0} * 2 (PACK)."""
    shapes = Counter((tuple(tuple(bundle.items()) for bundle in spec.bundles), spec.strategy) for spec in specs)
    texts = []
    for (bundles, strategy), number in shapes.items():
        each = ", ".join(f"{dict(bundle)} * {count}" for bundle, count in Counter(bundles).items())
        texts.append(f"{f'{number} x ' if number > 1 else ''}[{each}] ({strategy})")
    return " and ".join(texts)
