"""Which bundles of a placement group made by others an engine uses. Pure, over what the bundles hold and have free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vllm_ray_ascend.devices.kind import NPU, Kind
from vllm_ray_ascend.errors import PlacementError, ShortageError

INDICES_VARIABLE = "VLLM_RAY_BUNDLE_INDICES"
SHARE_VARIABLE = "VLLM_RAY_PER_WORKER_GPUS"


def check_bundles(
    specs: Sequence[Mapping[str, float]],
    free: Sequence[float] | None,
    world_size: int,
    indices: str | None,
    share: float = 1.0,
    nodes: Sequence[str] = (),
    driver: str = "",
    kind: Kind = NPU,
) -> list[int]:
    """Indices of the bundles of an engine's ``world_size`` workers, in the order of their ranks.

    They are those of VLLM_RAY_BUNDLE_INDICES (``indices``); else the first that hold an NPU, by ``nodes``, the node of
    each bundle, the ``driver``'s before others, as in vLLM's get_bundles_sorted_by_node. ``free`` is the NPUs still
    free in each bundle (None: not known), ``share`` what one worker takes. Raises PlacementError.
    """
    for index, spec in enumerate(specs):
        if spec.get(kind.key, 0) > 1:
            raise PlacementError(
                f"Bundle {index} of the placement group holds {kind.counted(spec[kind.key])}, vLLM wants one a bundle: "
                f"make the group with `ray.util.placement_group([{{'{kind.key}': 1}}] * {world_size})`"
            )
    usable = [index for index, spec in enumerate(specs) if spec.get(kind.key)]
    if nodes:
        usable.sort(key=lambda index: (nodes[index] != driver, nodes[index]))
    if len(usable) < world_size:
        raise PlacementError(
            f"The engine needs {world_size} bundles with {kind.one}, the placement group has {len(usable)} (in all "
            f"{len(specs)} bundles): lower --tensor-parallel-size or --pipeline-parallel-size, or make the group with "
            f"`ray.util.placement_group([{{'{kind.key}': 1}}] * {world_size})`"
        )
    chosen = _named(indices, specs, usable, world_size, kind) if indices else usable[:world_size]
    _check_share(chosen, specs, share, kind)
    if free is not None:
        _check_free(chosen, [index for index in usable if free[index] >= share], free, share, kind)
    return chosen


def _named(
    indices: str, specs: Sequence[Mapping[str, float]], usable: Sequence[int], world_size: int, kind: Kind
) -> list[int]:
    """The bundles that VLLM_RAY_BUNDLE_INDICES names."""
    example = f"for instance {_setting(usable[:world_size])}"
    try:
        chosen = [int(entry) for entry in indices.split(",")]
    except ValueError:
        raise _wrong(indices, f"is no list of numbers: {example}") from None
    if len(chosen) != world_size:
        raise _wrong(indices, f"names {_bundles(len(chosen))}, the engine needs {world_size}: {example}")
    if twice := sorted({index for index in chosen if chosen.count(index) > 1}):
        raise _wrong(indices, f"names bundle {_text(twice)} more than once, two workers cannot share it: {example}")
    if beyond := [index for index in chosen if not 0 <= index < len(specs)]:
        raise _wrong(indices, f"names bundle {_text(beyond)}, the group has 0 to {len(specs) - 1}: {example}")
    if bare := [index for index in chosen if index not in usable]:
        raise _wrong(indices, f"names bundle {_text(bare)} without {kind.key}, with one are {_text(usable)}: {example}")
    return chosen


def _check_share(chosen: Iterable[int], specs: Sequence[Mapping[str, float]], share: float, kind: Kind) -> None:
    """Raise PlacementError where a bundle holds less of an NPU than a worker takes: Ray would never start that one."""
    for index in chosen:
        if (held := specs[index][kind.key]) < share:
            raise PlacementError(
                f"Bundle {index} holds {held:g} {kind.key}, a worker takes {share:g}: make bundles of "
                f"{{'{kind.key}': {share:g}}}, or let a worker take less with {SHARE_VARIABLE}={held:g}"
            )


def _check_free(
    chosen: Sequence[int], free_ones: Sequence[int], free: Sequence[float], share: float, kind: Kind
) -> None:
    """Raise PlacementError where an engine holds a chosen bundle already, and name free ones."""
    held = [index for index in chosen if index not in free_ones]
    if not held:
        return
    left = ", ".join(f"bundle {index} has {free[index]:g} {kind.key} free" for index in held)
    if len(free_ones) < len(chosen):
        remedy = f"{len(chosen)} are needed: stop the other engine, or make the placement group larger"
    else:
        remedy = f"use such: {_setting(free_ones[: len(chosen)])}"
    raise ShortageError(
        f"Bundles of the placement group are held by another engine ({left}; a worker takes {share:g}). "
        f"Free are {_text(free_ones) or 'none'}; {remedy}"
    )


def _wrong(indices: str, what: str) -> PlacementError:
    return PlacementError(f"{INDICES_VARIABLE}={indices} {what}")


def _setting(indices: Iterable[int]) -> str:
    return f"{INDICES_VARIABLE}={','.join(map(str, indices))}"


def _text(indices: Iterable[int]) -> str:
    return ", ".join(map(str, indices))


def _bundles(number: int) -> str:
    return f"{number} bundle{'s' * (number != 1)}"
