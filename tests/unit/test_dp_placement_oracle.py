"""Our plan against the installed vLLM's own placement, on random clusters and requests.

vLLM's code runs unchanged; in place of Ray stand a table of free resources and a recorder of placement groups. It runs
in a process of its own (this file as a script), which must not load torch_npu: a unit test has no device libraries.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.cluster.dp_placement import DpRequest, NodeNpus, plan_placement
from vllm_ray_ascend.cluster.placement_groups import PlacementGroupSpec, pin_to_nodes
from vllm_ray_ascend.cluster.resources import NodeResources
from vllm_ray_ascend.errors import PlacementError

pytestmark = pytest.mark.unit

CASES = 8000
SEED = 20260211


def random_case(draw: random.Random) -> dict[str, Any]:
    """A cluster and a request, near the edge of what vLLM accepts."""
    most = draw.choice([1, 2, 4, 8])
    alike = draw.random() < 0.6
    free = [most if alike else draw.randint(0, most) for _ in range(draw.randint(1, 6))]
    addresses = [f"10.0.0.{number}" for number in range(1, len(free) + 1)]
    dp_size = draw.choice([1, 1, 2, 2, 3, 4, 6])
    allowed = draw.sample(addresses, draw.randint(1, len(addresses))) if draw.random() < 0.3 else []
    return {
        "nodes": dict(zip(addresses, free, strict=True)),
        "master_address": draw.choice(addresses) if draw.random() < 0.95 else "10.0.9.9",
        "dp_size": dp_size,
        "dp_size_local": draw.choice([1, 1, draw.randint(0, dp_size), dp_size]),
        "world_size": draw.choice([1, 2, most, 2 * most, 2 * most, 3 * most]),
        "strategy": draw.choice(["strict", "fill", "span", "span", "spread"]),
        "allowed_addresses": allowed,
        "all2all_backend": "deepep_low_latency" if draw.random() < 0.1 else "allgather_reducescatter",
    }


def ours(case: dict[str, Any]) -> list[Any] | None:
    nodes = [NodeNpus(address, free, 8) for address, free in case["nodes"].items()]
    options = {name: value for name, value in case.items() if name != "nodes"}
    try:
        ranks = plan_placement(
            DpRequest(**{**options, "allowed_addresses": frozenset(case["allowed_addresses"])}), nodes
        )
    except PlacementError:
        return None
    keys = [NodeResources(node.address, 8, 0, node_id=node.address) for node in nodes]
    specs = [PlacementGroupSpec("engine", rank.bundles(), rank.strategy) for rank in ranks]
    pinned = [pin_to_nodes(spec, rank.pins, keys) for spec, rank in zip(specs, ranks, strict=True)]
    return [[spec.bundles, spec.strategy, rank.local_dp_rank] for spec, rank in zip(pinned, ranks, strict=True)]


def test_the_plan_is_vllms_wherever_vllm_has_one() -> None:
    if find_spec("vllm") is None or find_spec("ray") is None:
        pytest.skip("vLLM or Ray is not installed")
    draw = random.Random(SEED)
    cases = [random_case(draw) for _ in range(CASES)]
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    for strategy in ("strict", "fill", "span"):
        placed = [bool(each) for case, each in zip(cases, theirs, strict=True) if case["strategy"] == strategy]
        assert min(placed.count(True), placed.count(False)) > 100, f"too few {strategy} cases of one kind to compare"
    for case, expected in zip(cases, theirs, strict=True):
        if expected is None and (case["strategy"] == "span" or case["dp_size_local"] == 0):
            check_fits(case, ours(case))  # nodes that differ, or none that says how many: vLLM makes nothing of them
        else:
            assert ours(case) == expected, case


def check_fits(case: dict[str, Any], ranks: list[Any] | None) -> None:
    taken = Counter(name for bundles, *_ in ranks or () for bundle in bundles if "NPU" in bundle for name in bundle)
    assert all(taken[f"node:{address}"] <= free for address, free in case["nodes"].items()), case


def upstream(case: dict[str, Any]) -> list[Any] | None:
    """What the installed vLLM does: bundles, strategy and local rank of each data parallel rank; None: it fails."""
    import ray
    import vllm.v1.engine.utils as engine

    table = {
        f"id{address}": {"CPU": 8.0, f"node:{address}": 1.0, **({"NPU": float(free)} if free else {})}
        for address, free in case["nodes"].items()
    }
    os.environ["VLLM_RAY_DP_PACK_STRATEGY"] = case["strategy"]
    os.environ["VLLM_RAY_DP_PLACEMENT_NODE_IPS"] = ",".join(case["allowed_addresses"])
    ray._private.state.available_resources_per_node = lambda: table
    ray.util.placement_group = dict  # a group is the arguments it was asked for with
    engine.current_platform = SimpleNamespace(ray_device_key="NPU")
    config = SimpleNamespace(
        data_parallel_master_ip=case["master_address"],
        data_parallel_size=case["dp_size"],
        data_parallel_size_local=case["dp_size_local"],
        world_size=case["world_size"],
        all2all_backend=case["all2all_backend"],
    )
    try:
        made, local = engine.CoreEngineActorManager.create_dp_placement_groups(SimpleNamespace(parallel_config=config))
    except (AssertionError, ValueError):
        return None
    return [[group["bundles"], group["strategy"], number] for group, number in zip(made, local, strict=True)]


if __name__ == "__main__":
    for absent in ("torch_npu", "torchvision"):
        sys.modules[absent] = None  # type: ignore[assignment]  # Python's own way to say "not installed"
    print(json.dumps([upstream(case) for case in json.load(sys.stdin)]))
