"""The benchmark of served engines: command lines, and what its clients write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.served.clients import read_aiperf, read_vllm
from benchmarks.served.options import AIPERF, CASES, VLLM, Case, Options, goals, metric, read_options
from benchmarks.served.servers import node_arguments

HEAD = "10.77.0.1"


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
@pytest.mark.parametrize("executor", ["upstream", "ours"])
def test_ray_has_one_server_for_all_nodes(case: Case, executor: str) -> None:
    (arguments,) = node_arguments(case, executor, HEAD)
    assert option(arguments, "--distributed-executor-backend") == "ray"
    assert (option(arguments, "--data-parallel-backend") == "ray") == ("--data-parallel-size" in arguments)
    assert "--headless" not in arguments and "--nnodes" not in arguments


def test_mp_has_a_server_on_each_node_and_only_the_first_has_an_api() -> None:
    assert len(node_arguments(CASES["tp2"], "mp", HEAD)) == 1
    pipeline = node_arguments(CASES["tp2-pp2-two-nodes"], "mp", HEAD)
    assert [option(each, "--node-rank") for each in pipeline] == ["0", "1"]
    data_parallel = node_arguments(CASES["dp2-two-nodes"], "mp", HEAD)
    assert [option(each, "--data-parallel-start-rank") for each in data_parallel] == [None, "1"]
    for nodes in (pipeline, data_parallel):
        assert ["--headless" in each for each in nodes] == [False, True]


def test_what_vllms_client_writes(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = {"ttfts": [0.5, 0.25, 0.0], "itls": [[0.1, 0.3], [0.2], []], "output_lens": [3, 3, 0]}
    path.write_text(json.dumps({**result, "errors": ["", "", "Service Unavailable"]}))
    found = read_vllm(path)
    assert found["first token"] == [0.5, 0.25]
    assert found["time per token"] == pytest.approx([0.2, 0.1])  # two tokens of the second came in one message


def test_what_aiperf_writes(tmp_path: Path) -> None:
    path = tmp_path / "profile_export.jsonl"
    good = {"time_to_first_token": {"value": 500.0, "unit": "ms"}, "inter_token_latency": {"value": 20.0}}
    path.write_text("".join(json.dumps({"metrics": metrics}) + "\n" for metrics in (good, {"error_isl": {"value": 1}})))
    assert read_aiperf(path) == {"first token": [0.5], "time per token": [0.02]}


def test_options_and_goals() -> None:
    assert read_options([]) == Options()
    options = read_options(["--cases", "tp2", "--rates", "2", "--aiperf", "/opt/aiperf"])
    assert options.clients == (VLLM, AIPERF)
    assert [goal.metric for goal in goals(options)] == [metric("time per token", each, 2.0) for each in (VLLM, AIPERF)]
