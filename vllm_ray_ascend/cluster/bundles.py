"""Which bundles of an existing placement group an engine uses. Pure, over what the bundles hold and have free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vllm_ray_ascend.cluster.rank_placement import order_bundles
from vllm_ray_ascend.devices.kind import NPU, SHARE_VARIABLE, Kind
from vllm_ray_ascend.errors import PlacementError, ShortageError

INDICES_VARIABLE = "VLLM_RAY_BUNDLE_INDICES"


def check_worker_share(share: float, kind: Kind = NPU) -> None:
    """Raise PlacementError where no worker can have ``share``, of VLLM_RAY_PER_WORKER_GPUS: vLLM takes any number."""
    if not 0 < share <= 1:  # nan too
        raise PlacementError(
            "VRA-287",
            f"{SHARE_VARIABLE}={share:g} is not what a worker can have: it has one {kind.key}, or a part of one. Set "
            "it to a number above 0 and not above 1, or unset it for a whole one.",
        )


def bundle_share(worker_share: float, world_size: int) -> float:
    """Return the part of an NPU that each bundle of an engine's own placement group holds.

    Only an engine of one worker asks for less than a whole one: Ray would put two bundles of a larger one on the same
    NPU, and HCCL has no group with one NPU twice.
    """
    return worker_share if world_size == 1 and 0 < worker_share < 1 else 1.0


def held_share(bundle_specs: Iterable[Mapping[str, float]], kind: Kind = NPU) -> float | None:
    """Return the part of a device that all bundles with one hold; None where it is a whole one, or differs."""
    held = {amount for bundle in bundle_specs if (amount := bundle.get(kind.key, 0)) > 0}
    (share,) = held if len(held) == 1 else (1.0,)
    return share if share < 1 else None


class BundleOrder(NamedTuple):
    """What bundles are chosen and ordered by: tensor parallel groups whole on a node, few nodes, the driver's first."""

    nodes: Sequence[str]
    """The node of each bundle."""
    driver: str = ""
    group_size: int = 1

    def choose(self, candidates: Iterable[int], world_size: int) -> list[int]:
        """Return the best bundles among ``candidates`` in the order of ranks; none where they are too few."""
        nodes = {index: self.nodes[index] for index in candidates}
        return order_bundles(nodes, self.group_size, world_size // self.group_size, self.driver)


def select_bundles(
    bundle_specs: Sequence[Mapping[str, float]],
    free: Sequence[float] | None,
    world_size: int,
    indices: str | None,
    share: float = 1.0,
    kind: Kind = NPU,
    order: BundleOrder | None = None,
) -> list[int]:
    """Return the bundle indices of an engine's ``world_size`` workers, in the order of their ranks.

    They are those of VLLM_RAY_BUNDLE_INDICES (``indices``), as given; else some that hold an NPU, by ``order`` (None:
    the first). ``free`` is the number of free NPUs in each bundle (None: not known), ``share`` what one worker takes.
    Raises PlacementError.
    """
    for bundle_index, spec in enumerate(bundle_specs):
        if spec.get(kind.key, 0) > 1:
            raise PlacementError(
                "VRA-218",
                f"Bundle {bundle_index} of the placement group holds {kind.format_count(spec[kind.key])}, vLLM needs "
                f"one in each bundle: create the group with `ray.util.placement_group([{{'{kind.key}': 1}}] * "
                f"{world_size})`",
            )
    usable = [bundle_index for bundle_index, spec in enumerate(bundle_specs) if spec.get(kind.key)]
    if len(usable) < world_size:
        raise PlacementError(
            "VRA-219",
            f"The engine needs {world_size} bundles with {kind.with_article}, the placement group has {len(usable)} "
            f"(of {len(bundle_specs)} bundles in all): lower --tensor-parallel-size or --pipeline-parallel-size, or "
            f"create the group with `ray.util.placement_group([{{'{kind.key}': 1}}] * {world_size})`",
        )
    order = order or BundleOrder([""] * len(bundle_specs))
    best = order.choose(usable, world_size)
    chosen = _parse_indices(indices, bundle_specs, usable, best, kind) if indices else best
    _check_share(chosen, bundle_specs, share, kind)
    if free is not None:
        free_indices = [index for index in usable if free[index] >= share]
        _check_free(chosen, free_indices, order.choose(free_indices, world_size), free, share, kind)
    return chosen


def _parse_indices(
    indices: str, bundle_specs: Sequence[Mapping[str, float]], usable: Sequence[int], best: Sequence[int], kind: Kind
) -> list[int]:
    """Return the bundle indices that VLLM_RAY_BUNDLE_INDICES names. ``best`` are those that would be chosen without."""
    world_size = len(best)
    setting = f"{INDICES_VARIABLE}={indices}"
    example = f"for example {_format_setting(best)}"
    try:
        chosen = [int(entry) for entry in indices.split(",")]
    except ValueError:
        raise PlacementError("VRA-220", f"{setting} is not a list of numbers: {example}") from None
    if len(chosen) != world_size:
        raise PlacementError(
            "VRA-221", f"{setting} names {_format_count(len(chosen))}, the engine needs {world_size}: {example}"
        )
    if repeated := sorted({index for index in chosen if chosen.count(index) > 1}):
        raise PlacementError(
            "VRA-222",
            f"{setting} names bundle {_format_list(repeated)} more than once, two workers cannot share it: {example}",
        )
    if out_of_range := [index for index in chosen if not 0 <= index < len(bundle_specs)]:
        raise PlacementError(
            "VRA-223",
            f"{setting} names bundle {_format_list(out_of_range)}, the group has 0 to {len(bundle_specs) - 1}: "
            f"{example}",
        )
    if without_device := [index for index in chosen if index not in usable]:
        raise PlacementError(
            "VRA-224",
            f"{setting} names bundle {_format_list(without_device)} without {kind.key}, with one are "
            f"{_format_list(usable)}: {example}",
        )
    return chosen


def _check_share(chosen: Iterable[int], bundle_specs: Sequence[Mapping[str, float]], share: float, kind: Kind) -> None:
    """Raise PlacementError where a bundle holds less of an NPU than a worker takes: Ray would never start that one."""
    for bundle_index in chosen:
        if (held := bundle_specs[bundle_index][kind.key]) < share:
            raise PlacementError(
                "VRA-225",
                f"Bundle {bundle_index} holds {held:g} {kind.key}, a worker takes {share:g}: create bundles of "
                f"{{'{kind.key}': {share:g}}}, or let a worker take less with {SHARE_VARIABLE}={held:g}",
            )


def _check_free(
    chosen: Sequence[int],
    free_indices: Sequence[int],
    best_free: Sequence[int],
    free: Sequence[float],
    share: float,
    kind: Kind,
) -> None:
    """Raise ShortageError where another engine holds a chosen bundle, and name the best that are free."""
    held = [bundle_index for bundle_index in chosen if bundle_index not in free_indices]
    if not held:
        return
    left = ", ".join(f"bundle {bundle_index} has {free[bundle_index]:g} {kind.key} free" for bundle_index in held)
    if not best_free:
        remedy = f"{len(chosen)} are needed: stop the other engine, or make the placement group larger"
    else:
        remedy = f"use these: {_format_setting(best_free)}"
    raise ShortageError(
        "VRA-226",
        f"Bundles of the placement group are held by another engine ({left}; a worker takes {share:g}). "
        f"Free are {_format_list(free_indices) or 'none'}; {remedy}",
    )


def _format_setting(indices: Iterable[int]) -> str:
    return f"{INDICES_VARIABLE}={','.join(map(str, indices))}"


def _format_list(indices: Iterable[int]) -> str:
    return ", ".join(map(str, indices))


def _format_count(number: int) -> str:
    return f"{number} bundle{'s' * (number != 1)}"
