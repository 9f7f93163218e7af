"""VLLM_RAY_ASCEND_EXECUTOR=compiled_graph: the same tokens as ever, over HCCL; deaths as with the default executor.

The tokens are those of Transformers, which tests/e2e/test_tokens.py shows of the default executor in the same layouts.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from demo.train.recitation import DENSE
from demo.train.reference import Entry, stored_reference
from tests.e2e.conftest import generated, on_head
from tests.e2e.placed import check_text, server_of, topology_of
from tests.e2e.test_death import (
    LIMIT_S,
    PATIENT,
    SIZES,
    check_all_gone,
    endless,
    ends,
    kill,
    killed_in_a_request,
)
from tests.e2e.test_tokens import Case, check_generated, check_start_line, check_workers
from vllm_ray_ascend.settings import variable_of
from vllm_ray_ascend.softnpu.cluster.plan import Cluster

EXECUTOR = {variable_of("executor"): "compiled_graph"}
HIDDEN_TENSORS = 2
"""Of a stage for the next one: hidden states and residual, in float32."""


def check_transfers(case: Case, entries: list[Entry], facts: list[dict[str, Any]]) -> None:
    """All hidden states went over HCCL, from rank to rank of the next stage, and none through the host."""
    tokens = sum(len(entry["tokens"]) - 1 for entry in entries)  # a prompt may come from the cache
    least = tokens * hidden_size(DENSE) * 4 * HIDDEN_TENSORS
    for fact in facts:
        assert fact["host_copies"] == 0
        messages, sent, _, received = fact["point_to_point"]
        first = fact["rank"] < case.tp
        assert (sent >= least) is first
        assert (received >= least) is not first
        assert messages > 0 or not first


def hidden_size(model: Path) -> int:
    size: int = json.loads((model / "config.json").read_text())["hidden_size"]
    return size


@pytest.mark.parametrize(
    "case",
    [
        Case("two_nodes_of_two", 2, 2),
        pytest.param(Case("two_nodes_of_one", 1, 2, eager=True), marks=pytest.mark.slow),
        pytest.param(Case("one_node", 2, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_are_right_and_hidden_states_go_over_hccl(case: Case, request: pytest.FixtureRequest) -> None:
    cluster: Cluster = request.getfixturevalue(case.cluster)
    entries = stored_reference(DENSE, case.dtype)
    options = {
        "model": str(DENSE),
        "tp": case.tp,
        "pp": case.pp,
        "eager": case.eager,
        "dtype": case.dtype,
        "singles": [],
    }
    result, log = generated(cluster, options, **EXECUTOR)
    check_generated(entries, result["batch"], case.dtype)
    check_workers(case, result["facts"])
    check_transfers(case, entries, result["facts"])
    check_start_line(log, case.tp * case.pp)
    assert "start: compiled graph took" in log
    check_all_gone(cluster)


@pytest.mark.slow
def test_a_worker_killed_in_decode_ends_the_request_and_leaves_nothing(
    two_nodes_of_two: Cluster, tmp_path: Path
) -> None:
    with server_of(two_nodes_of_two, DENSE, tmp_path / "log", *SIZES, **EXECUTOR) as server:
        server.wait_until_healthy()
        check_text(server, DENSE, 1)
        victim = killed_in_a_request(two_nodes_of_two, server)
    log = (tmp_path / "log").read_text()
    assert f"Worker process {victim['pid']} of rank {victim['rank']}" in log
    check_all_gone(two_nodes_of_two)


@pytest.mark.slow
def test_the_driver_is_killed_and_leaves_nothing(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    with server_of(two_nodes_of_two, DENSE, tmp_path / "log", *SIZES, **EXECUTOR) as server:
        server.wait_until_healthy()
        stream = endless(server)
        engine = topology_of(two_nodes_of_two)["engines"][0]
        kill(two_nodes_of_two, 1, engine["pid"])
        ends(server)
        stream.close()
    check_all_gone(two_nodes_of_two)


@pytest.mark.slow
def test_a_server_ends_in_order(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    with server_of(two_nodes_of_two, DENSE, tmp_path / "log", *SIZES, **PATIENT, **EXECUTOR) as server:
        server.wait_until_healthy()
        check_text(server, DENSE, 1)
        server._process.send_signal(signal.SIGINT)
        server._process.wait(LIMIT_S)
    log = (tmp_path / "log").read_text()
    assert "Worker process" not in log and "did not end in time" not in log
    check_all_gone(two_nodes_of_two)


REFUSED = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM
try:
    LLM(model=sys.argv[1], dtype="float32", tensor_parallel_size=2, distributed_executor_backend="ray",
        max_model_len=256, kv_cache_memory_bytes=16 << 20, enforce_eager=True)
except Exception as error:
    print("REFUSED", type(error).__name__, error)
"""


@pytest.mark.slow
def test_what_cannot_work_is_refused_before_any_worker(two_nodes_of_two: Cluster) -> None:
    done = on_head(two_nodes_of_two, "-c", REFUSED, str(DENSE), VLLM_RAY_ASCEND_RECOVER="1", **EXECUTOR)
    assert "REFUSED SettingError VLLM_RAY_ASCEND_EXECUTOR=compiled_graph" in done.stdout, done.stdout + done.stderr
    check_all_gone(two_nodes_of_two)
