"""What users do with vLLM works under our executor: each feature in its own check, many checks in one engine start.

The checks are in tests/e2e/parity and run on the cluster; docs/features.md says which feature each proves.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from softnpu.cluster.plan import Cluster

from demo.train.recitation import DENSE
from tests.e2e.conftest import CONTROL_TOKEN, ROOT, find_logs_with, run_on_head
from tests.e2e.generate import MARKER
from tests.e2e.parity.reference import ADAPTERS, SCALED

TEXT = (
    *("tokens", "logprobs", "batches_in_flight", "async_scheduling", "prefix_caching", "chunked_prefill"),
    *("structured_output", "seeded_samples", "stop_strings", "abort"),
)
CONTROL = ("collective_rpc", "weight_update", "sleep_1", "sleep_2", "runtime_env", "metrics")

DRIVER_SECRET, RUNTIME_SECRET = "PARITY_API_TOKEN", "PARITY_RUNTIME_TOKEN"
SECRETS = {DRIVER_SECRET: "driver-secret-7731", RUNTIME_SECRET: "runtime-secret-9942"}
DRIVER = {DRIVER_SECRET: SECRETS[DRIVER_SECRET], "HCCL_CONNECT_TIMEOUT": "121", "VLLM_RAY_ASCEND_STOP_GRACE_S": "13"}
RUNTIME_ENV = {
    RUNTIME_SECRET: SECRETS[RUNTIME_SECRET],
    "HCCL_CONNECT_TIMEOUT": "222",
    "VLLM_RAY_ASCEND_STOP_GRACE_S": "17",
}
"""The user's variables: they take precedence over the driver's, our own switches included."""


class Start(NamedTuple):
    """One start of an engine, and the features that are checked in it."""

    name: str
    cluster: str
    tp: int
    pp: int
    features: tuple[str, ...]
    arguments: dict[str, Any]


SLEEPING: dict[str, Any] = {"enable_sleep_mode": True}
ADAPTED: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}

STARTS = (
    Start(
        *("frugal", "one_node", 1, 2),
        (
            *("logprobs", "batches_in_flight", "async_scheduling", "prefix_caching", "chunked_prefill"),
            *("structured_output", "collective_rpc", "weight_update", "sleep_1", "runtime_env", "metrics"),
        ),
        SLEEPING,
    ),
)
"""Those of the default run."""
SLOW = (
    Start("pp2", "one_node", 1, 2, (*TEXT, *CONTROL), SLEEPING),
    Start("tp2-pp2-two-nodes", "two_nodes_of_two", 2, 2, (*TEXT, *CONTROL), SLEEPING),
    Start("tp2-synchronous", "one_node", 2, 1, (*TEXT, *CONTROL), {**SLEEPING, "async_scheduling": False}),
    Start("lora-tp2", "one_node", 2, 1, ("lora", "tokens", "abort"), ADAPTED),
    Start("lora-pp2", "two_nodes_of_one", 1, 2, ("lora", "tokens"), ADAPTED),
    Start("ngram-tp2", "one_node", 2, 1, ("speculation",), {"speculative_config": SPECULATIVE}),
)


def make_references(start: Start, folder: Path) -> None:
    """Compute Transformers' tokens with the changed weights of this start, in a process without torch_npu."""
    names = [SCALED] * ("weight_update" in start.features) + [*ADAPTERS] * ("lora" in start.features)
    command = [sys.executable, "-m", "tests.e2e.parity.reference", str(DENSE), str(folder), *names]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)


_ran: dict[str, tuple[dict[str, Any], str]] = {}


def run_engine_once(start: Start, request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    """Return the results of the start's features, and the whole log. Each start runs once for all tests."""
    if start.name not in _ran:
        cluster: Cluster = request.getfixturevalue(start.cluster)
        folder = request.getfixturevalue("tmp_path_factory").mktemp("parity")
        make_references(start, folder)
        options = {
            "model": str(DENSE),
            "tp": start.tp,
            "pp": start.pp,
            "folder": str(folder),
            "features": start.features,
            "arguments": start.arguments,
            "runtime_env": RUNTIME_ENV,
            "secret": DRIVER_SECRET,
        }
        done = run_on_head(cluster, "-m", "tests.e2e.parity", json.dumps(options), **DRIVER)
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
        result = json.loads(lines[-1][len(MARKER) :]) if lines else {"features": {}}
        print(json.dumps({"remarks": result.get("remarks"), "seconds": result.get("seconds")}, indent=1))
        _ran[start.name] = (result, done.stdout + done.stderr)
    return _ran[start.name]


def cases() -> list[Any]:
    found = []
    for start in (*STARTS, *SLOW):
        marks = [pytest.mark.slow] if start in SLOW else []
        found += [pytest.param(start, feature, id=f"{start.name}-{feature}", marks=marks) for feature in start.features]
    return found


@pytest.mark.parametrize(("start", "feature"), cases())
def test_feature(start: Start, feature: str, request: pytest.FixtureRequest) -> None:
    result, log = run_engine_once(start, request)
    assert feature in result["features"], f"the engine did not reach this check\n{log[-6000:]}"
    assert result["features"][feature] == "ok", result["features"][feature]


@pytest.mark.parametrize(
    "start", [pytest.param(each, id=each.name, marks=[pytest.mark.slow] * (each in SLOW)) for each in (*STARTS, *SLOW)]
)
def test_no_secret_in_any_log(start: Start, request: pytest.FixtureRequest) -> None:
    """Neither the driver's log nor Ray's logs of any node's processes show what secret variables hold.

    Ray's own agent logs the user's runtime_env, which only the user can keep secrets out of; nothing of ours is in it.
    """
    result, log = run_engine_once(start, request)
    assert result["features"], log[-6000:]
    cluster: Cluster = request.getfixturevalue(start.cluster)
    assert find_logs_with(cluster, re.escape(SECRETS[RUNTIME_SECRET]), log) <= {"runtime_env_agent.log"}
    assert not find_logs_with(cluster, re.escape(SECRETS[DRIVER_SECRET]), log)
    assert not find_logs_with(cluster, CONTROL_TOKEN, log)
