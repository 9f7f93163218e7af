"""One `vllm serve` over two nodes, as `make serve` starts it: valid, concurrent, aborted and invalid requests."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from softnpu.cluster.plan import Cluster

from demo.cluster import to_npu_cluster
from demo.options import Options
from demo.server import Server
from demo.train.recitation import DENSE, PROMPTS, QUESTION, zen_after, zen_text
from vllm_ray_ascend.observability.metrics import (
    ABORTED,
    DP_RANK_RESTARTS,
    DP_RANK_UP,
    FAILURE_DETECTION,
    FAILURE_INFO,
    FAILURE_TIME,
    FAILURES,
    FALLBACKS,
    GRAPHS,
    METRICS,
    PHASES,
    RANK_INFO,
    RANKS,
    RANKS_ALIVE,
    REPORT_TIME,
    RESTART_TIME,
    RESTARTS,
    ROUND_TRIP,
    WRITE_TIME,
    WRITES,
)

MODEL = DENSE.name
SHORT = PROMPTS[-1]
"""The prompt with the shortest text after it: enough to check whether the server works."""


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def server(two_nodes_of_two: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ("--worker-extension-cls", "tests.e2e.facts.WorkerFacts")
    options = Options(model=str(DENSE), port=find_free_port(), arguments=arguments, once=True, npus=4)
    root = Path(__file__).resolve().parents[2]
    variables = {**os.environ, "PYTHONPATH": str(root), "VLLM_SERVER_DEV_MODE": "1"}
    npu_cluster = to_npu_cluster(two_nodes_of_two, variables)
    with Server(options, npu_cluster, tmp_path_factory.mktemp("serve") / "serve.log") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


def complete(client: openai.OpenAI, prompt: str, max_tokens: int = 400) -> str:
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=max_tokens)
    return str(answer.choices[0].text)


def test_placement_is_printed_and_covers_both_nodes(server: Server, two_nodes_of_two: Cluster) -> None:
    lines = server.placement()
    assert len(lines) == 4
    for node in two_nodes_of_two.nodes:
        assert sum(node.address in line for line in lines) == 2


def test_every_worker_is_on_an_npu_with_hccl(server: Server) -> None:
    answer = httpx.post(f"{server.url}/collective_rpc", json={"method": "facts"}, timeout=60)
    facts = answer.raise_for_status().json()["results"]
    assert len(facts) == 4
    for fact in facts:
        text = str(fact)
        assert "vllm_ascend.worker.worker.NPUWorker" in text
        assert "'parameter_devices': ['npu']" in text or '"parameter_devices": ["npu"]' in text
        assert text.count("hccl") == 2


def test_completion(client: openai.OpenAI) -> None:
    for prompt in (PROMPTS[4], SHORT):  # the whole text: test_chat
        assert complete(client, prompt) == zen_after(prompt)


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=400)
    assert (answer.choices[0].message.content or "").strip() == zen_text()
    assert answer.choices[0].finish_reason == "stop"


def test_streaming_gives_the_same_in_pieces(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=SHORT, temperature=0, max_tokens=400, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 10
    assert "".join(pieces) == zen_after(SHORT)


def test_twenty_clients_at_once(client: openai.OpenAI) -> None:
    prompts = [PROMPTS[3 + index % 3] for index in range(20)]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    assert answers == [zen_after(prompt) for prompt in prompts]


def running_requests(server: Server) -> float:
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics if line.startswith("vllm:num_requests_running"))


def test_metrics_of_the_engine_are_with_vllm_s(server: Server, two_nodes_of_two: Cluster) -> None:
    """After the requests above: what arose in the engine core's process and in the workers."""
    answer = httpx.get(f"{server.url}/metrics", timeout=30)
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name in METRICS:
                assert sample.labels.pop("model_name") == MODEL and sample.labels.pop("engine") == "0"
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    of_failures = {each.name for each in (FAILURE_INFO, FAILURE_DETECTION, FAILURE_TIME, RESTART_TIME)}
    counters = (FAILURES, RESTARTS, ABORTED, FALLBACKS)
    assert [found[each.name] for each in counters] == [{(): 0}] * len(counters)
    of_ranks = {DP_RANK_UP.name, DP_RANK_RESTARTS.name}
    assert set(METRICS) - found.keys() == of_failures | of_ranks, "there are no data parallel ranks"
    assert found[RANKS.name] == found[RANKS_ALIVE.name] == {(): 4}
    assert {node for node, _, _ in found[RANK_INFO.name]} == {node.address for node in two_nodes_of_two.nodes}
    assert (
        found[WRITES.name][()] > 100
        and 0 < found[WRITE_TIME.name][()] < time.time() - found[REPORT_TIME.name][()] + 600
    )
    assert found[GRAPHS.name][()] > 0 and ("graphs and warm-up",) in found[PHASES.name]
    assert 0 < found[ROUND_TRIP.name][()] < 60


def test_a_client_that_disconnects(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="def main(args):", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert complete(client, SHORT) == zen_after(SHORT)
    with contextlib.suppress(StopIteration):
        next(_ for _ in range(600) if running_requests(server) == 0)
    assert running_requests(server) == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "no-such-model", "prompt": "x"}),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": -1}),
        ("/v1/completions", {"model": MODEL, "prompt": "x " * 5000}),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "temperature": "warm"}),
        ("/v1/chat/completions", {"model": MODEL, "messages": "not a list"}),
    ],
)
def test_a_bad_request_is_rejected_and_the_server_continues(
    server: Server, client: openai.OpenAI, path: str, body: dict[str, Any]
) -> None:
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"]
    text = complete(client, SHORT, max_tokens=5)
    assert text and zen_after(SHORT).startswith(text)
