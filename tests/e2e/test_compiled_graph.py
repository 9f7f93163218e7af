"""VLLM_RAY_ASCEND_EXECUTOR=compiled_graph: the same tokens, over HCCL; worker failures as with the default executor.

The tokens are those of Transformers, which tests/e2e/test_tokens.py shows of the default executor in the same layouts.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from softnpu.cluster.plan import Cluster

from demo.train.recitation import DENSE
from demo.train.reference import Entry, stored_reference
from tests.e2e.conftest import run_generation, run_on_head
from tests.e2e.servers import check_text, create_server, read_topology
from tests.e2e.test_death import (
    LIMIT_S,
    PATIENT,
    SIZES,
    check_no_leftovers,
    kill_worker_in_request,
    send_signal,
    start_endless_request,
    wait_for_server_exit,
)
from tests.e2e.test_tokens import Case, check_generated, check_start_line, check_workers
from vllm_ray_ascend.settings import variable_of

EXECUTOR = {variable_of("executor"): "compiled_graph"}
HIDDEN_TENSORS = 2
"""Of a stage for the next one: hidden states and residual, in float32."""


def check_transfers(case: Case, entries: list[Entry], facts: list[dict[str, Any]]) -> None:
    """Check that all hidden states went over HCCL, from rank to rank of the next stage, and none through the host."""
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
    result, log = run_generation(cluster, options, **EXECUTOR)
    check_generated(entries, result["batch"], case.dtype)
    check_workers(case, result["facts"])
    check_transfers(case, entries, result["facts"])
    check_start_line(log, case.tp * case.pp)
    assert "start: compiled graph took" in log
    check_no_leftovers(cluster)


@pytest.mark.slow
def test_a_worker_killed_in_decode_ends_the_request_and_leaves_nothing(
    two_nodes_of_two: Cluster, tmp_path: Path
) -> None:
    with create_server(two_nodes_of_two, DENSE, tmp_path / "log", *SIZES, **EXECUTOR) as server:
        server.wait_until_healthy()
        check_text(server, DENSE, 1)
        victim = kill_worker_in_request(two_nodes_of_two, server)
    log = (tmp_path / "log").read_text()
    assert f"Worker process {victim['pid']} of rank {victim['rank']}" in log
    check_no_leftovers(two_nodes_of_two)


@pytest.mark.slow
def test_the_driver_is_killed_and_leaves_nothing(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    with create_server(two_nodes_of_two, DENSE, tmp_path / "log", *SIZES, **EXECUTOR) as server:
        server.wait_until_healthy()
        stream = start_endless_request(server)
        engine = read_topology(two_nodes_of_two)["engines"][0]
        send_signal(two_nodes_of_two, 1, engine["pid"])
        wait_for_server_exit(server)
        stream.close()
    check_no_leftovers(two_nodes_of_two)


@pytest.mark.slow
def test_a_server_shuts_down_in_order(two_nodes_of_two: Cluster, tmp_path: Path) -> None:
    with create_server(two_nodes_of_two, DENSE, tmp_path / "log", *SIZES, **PATIENT, **EXECUTOR) as server:
        server.wait_until_healthy()
        check_text(server, DENSE, 1)
        server._process.send_signal(signal.SIGINT)
        server._process.wait(LIMIT_S)
    log = (tmp_path / "log").read_text()
    assert "Worker process" not in log and "did not exit in time" not in log
    check_no_leftovers(two_nodes_of_two)


REJECTED = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM
try:
    LLM(model=sys.argv[1], dtype="float32", tensor_parallel_size=2, distributed_executor_backend="ray",
        max_model_len=256, kv_cache_memory_bytes=16 << 20, enforce_eager=True)
except Exception as error:
    print("REJECTED", type(error).__name__, error)
"""


@pytest.mark.slow
def test_unsupported_options_are_rejected_before_any_worker_starts(two_nodes_of_two: Cluster) -> None:
    done = run_on_head(two_nodes_of_two, "-c", REJECTED, str(DENSE), VLLM_RAY_ASCEND_RECOVER="1", **EXECUTOR)
    assert "REJECTED SettingError VRA-466: VLLM_RAY_ASCEND_EXECUTOR=compiled_graph" in done.stdout, (
        done.stdout + done.stderr
    )
    check_no_leftovers(two_nodes_of_two)
