"""A server of a mixture of experts gains and loses data parallel ranks; its text and its experts stay right."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import psutil  # type: ignore[import-untyped]
import pytest
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster
from softnpu.cluster.processes import find_cluster_processes

from demo.server import Server
from demo.train.recitation import MOE, PROMPTS, zen_after
from tests.e2e.conftest import run_on_head
from tests.e2e.servers import create_server, opened_npus, opened_npus_by_node, temporary_cluster
from tests.e2e.test_bad_input import NOTHING_LEFT, check_nothing_left
from tests.e2e.test_death import check_no_leftovers, send_signal, wait_for_server_exit, wait_until
from tests.e2e.test_rank_recovery import RESTORED, engine_core, health, kill_raylet, wait_for_event

ELASTIC = (
    *("--tensor-parallel-size", "1", "--data-parallel-size", "2", "--data-parallel-backend", "ray"),
    *("--enable-expert-parallel", "--enable-eplb", "--enable-elastic-ep", "--elastic-ep-max-dp-size", "4"),
    *("--eplb-config.use_async", "false", "--eplb-config.policy", "default"),
    *("--worker-extension-cls", "tests.e2e.elastic_facts.ElasticFacts"),
)
GRAPHS = ("--no-enforce-eager", "--compilation-config", json.dumps({"cudagraph_capture_sizes": [1, 2, 4]}))
VARIABLES = {"VLLM_RAY_ASCEND_ELASTIC_EP": "1", "VLLM_SERVER_DEV_MODE": "1"}
LIMIT_S = 1200.0
EXPERTS, EXPERTS_OF_A_RANK = 8, 4


@contextmanager
def elastic_server(cluster: Cluster, folder: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    with create_server(cluster, MOE, folder / "log", *ELASTIC, *arguments, **VARIABLES, **variables) as server:
        server.wait_until_healthy()
        yield server


def request_scaling(server: Server, size: int) -> httpx.Response:
    return httpx.post(f"{server.url}/scale_elastic_ep", json={"new_data_parallel_size": size}, timeout=LIMIT_S)


def scale(server: Server, size: int, experts: int = EXPERTS_OF_A_RANK, tensor: int = 1) -> None:
    answer = request_scaling(server, size)
    assert answer.status_code == 200, answer.text
    check_scaled(server, size, experts, tensor)


def check_scaled(server: Server, size: int, experts: int = EXPERTS_OF_A_RANK, tensor: int = 1) -> None:
    """Check that all ranks agree about their number and have the right experts, and that each generates the text.

    ``experts`` are those of a data parallel rank, of ``tensor`` workers.
    """
    facts = call_workers(server, "check_experts")
    assert (facts["size"], facts["dp_size"], facts["physical"]) == (size * tensor, size, size * experts)
    check_texts(server, size)


def check_texts(server: Server, size: int) -> None:
    """Check that each rank continues two prompts rightly, so that every replica of an expert is used."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
    for rank in range(size):
        for prompt in (PROMPTS[2], PROMPTS[5]):
            headers = {"X-data-parallel-rank": str(rank)}
            answer = client.completions.create(
                model=MOE.name, prompt=prompt, temperature=0, max_tokens=100, extra_headers=headers
            )
            text = answer.choices[0].text
            assert len(text) > 100 and zen_after(prompt).startswith(text), f"data parallel rank {rank}"


def graph_facts(server: Server, folder: Path) -> list[dict[str, Any]]:
    """Return what each rank says of its graphs."""
    folder.mkdir()
    call_workers(server, "graph_facts", str(folder))
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def check_graphs(server: Server, folder: Path, size: int, captured: Sequence[int]) -> list[int]:
    """Check that all ranks alike have captured their graphs again, and replay them; return how many each has captured.

    ``captured`` are those of before, of the ranks that there were.
    """
    before = graph_facts(server, folder / "before")
    check_texts(server, size)
    after = graph_facts(server, folder / "after")
    assert [rank["sizes"] for rank in before] == [[1, 2, 4]] * size
    assert all(rank["captured"] > earlier for rank, earlier in zip(before, captured, strict=False)), (before, captured)
    assert all(last["replays"] > first["replays"] for first, last in zip(before, after, strict=True)), (before, after)
    return [rank["captured"] for rank in after]


def call_workers(server: Server, method: str, *arguments: str) -> Any:
    call = {"method": method, "args": arguments}
    answer = httpx.post(f"{server.url}/collective_rpc", json=call, timeout=LIMIT_S)
    assert answer.status_code == 200, answer.text
    return answer.json()["results"][0]


def wait_for_npus(cluster: Cluster, node: int, npus: list[int], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while opened_npus_by_node(cluster).get(node, []) != npus:
        assert time.monotonic() < deadline, opened_npus_by_node(cluster)
        time.sleep(0.5)


def test_two_ranks_become_three_and_two_again(tmp_path: Path) -> None:
    """On one node, eagerly, with experts over HCCL, each of them on both ranks at first."""
    with temporary_cluster("e2e-elastic", 1, 3) as cluster:
        with elastic_server(cluster, tmp_path, "--eplb-config.num_redundant_experts", "8") as server:
            check_scaled(server, 2, experts=8)
            scale(server, 3, experts=8)
            assert opened_npus_by_node(cluster) == {1: [0, 1, 2]}
            sent, _, received, _ = call_workers(server, "check_experts")["point_to_point"]
            assert sent + received > 0
            scale(server, 2, experts=8)
            wait_for_npus(cluster, 1, [0, 1])
        check_nothing_left(cluster)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), GRAPHS, ("--eplb-config.communicator", "torch_gloo")])
def test_sizes_in_turn(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Also uneven ones, and the same again."""
    with temporary_cluster("e2e-elastic-turns", 1, 4) as cluster, elastic_server(cluster, tmp_path, *options) as server:
        captured: list[int] = []
        for number, size in enumerate((4, 2, 4, 2, 3, 2)):
            scale(server, size)
            if options == GRAPHS:
                (folder := tmp_path / f"{number}").mkdir()
                captured = check_graphs(server, folder, size, captured)


@pytest.mark.slow
@pytest.mark.multinode
def test_ranks_join_on_another_node(tmp_path: Path) -> None:
    with temporary_cluster("e2e-elastic-nodes", 2, 2) as cluster:
        with elastic_server(cluster, tmp_path) as server:
            for size in (4, 2, 4):
                scale(server, size)
                wait_for_npus(cluster, 1, [0, 1])
                wait_for_npus(cluster, 2, [0, 1] if size == 4 else [])
        check_nothing_left(cluster)


class Recital(NamedTuple):
    """A text that a rank has streamed, and when, by time.monotonic()."""

    began: float
    ended: float
    text: str


def recite(server: Server, rank: int, stop: threading.Event) -> list[Recital]:
    """Read the whole text from one rank, one stream after the other, until ``stop`` is set.

    The server may refuse to begin one, as it does while it commits. A stream that has begun must not break.
    """
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
    recitals: list[Recital] = []
    while not stop.is_set():
        try:
            stream = client.completions.create(
                model=MOE.name,
                prompt=PROMPTS[0],
                temperature=0,
                max_tokens=450,
                stream=True,
                extra_headers={"X-data-parallel-rank": str(rank)},
            )
        except openai.InternalServerError:
            time.sleep(0.05)
            continue
        began = time.monotonic()
        text = "".join(chunk.choices[0].text for chunk in stream)
        recitals.append(Recital(began, time.monotonic(), text))
    return recitals


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 4), (2, 3), (4, 2)])
def test_a_text_goes_on_across_the_commit(tmp_path: Path, sizes: tuple[int, int]) -> None:
    """On each rank that stays one has begun before the commit and ended after it. None is broken."""
    before, after = sizes
    redundant = before * EXPERTS_OF_A_RANK - EXPERTS  # so that every expert fits on fewer ranks
    options = (
        *("--data-parallel-size", str(before), "--eplb-config.num_redundant_experts", str(redundant)),
        "--no-enable-prefix-caching",
    )
    with (
        temporary_cluster("e2e-elastic-text", 1, 4) as cluster,
        elastic_server(cluster, tmp_path, *options) as server,
        ThreadPoolExecutor(3) as pool,
    ):
        stop = threading.Event()
        readers = [pool.submit(recite, server, rank, stop) for rank in (0, 1)]
        try:
            answer = pool.submit(request_scaling, server, after)
            wait_for_log(server, "Committing prepared reconfiguration", answer)
            committing = time.monotonic()
            assert answer.result().status_code == 200, answer.result().text
        finally:
            stop.set()
        for reader in readers:
            recitals = reader.result()
            assert {recital.text for recital in recitals} == {zen_after(PROMPTS[0])}
            assert any(recital.began < committing < recital.ended for recital in recitals), (committing, recitals)
        check_scaled(server, after)


@pytest.mark.slow
def test_a_new_rank_that_dies_is_undone(tmp_path: Path) -> None:
    """While its engine core starts, its worker starts, or loads its model; the others serve, the next one succeeds."""
    with temporary_cluster("e2e-elastic-death", 1, 4) as cluster, elastic_server(cluster, tmp_path) as server:
        starting = (functools.partial(kill_new_actor, name) for name in ("EngineCoreActor", "WorkerProc"))
        for kill in (*starting, functools.partial(kill_new_worker, cluster)):
            with scaling(server, 4) as answer:
                kill()
            assert answer.result().status_code == 500 and "VRA-343" in answer.result().text, answer.result().text
            check_scaled(server, 2)
            wait_for_npus(cluster, 1, [0, 1])
        scale(server, 4)


def kill_new_actor(name: str) -> None:
    """Kill the first process of a further actor of Ray whose class has ``name``."""
    before = actor_processes(name)
    deadline = time.monotonic() + LIMIT_S
    while not (new := actor_processes(name) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    min(new, key=lambda process: process.pid).kill()


def actor_processes(name: str) -> set[psutil.Process]:
    """Return the processes of Ray's actors whose class has ``name``."""
    return {
        process
        for process in psutil.process_iter(["cmdline"])
        if (title := " ".join(process.info["cmdline"] or ())).startswith("ray::") and name in title
    }


def kill_new_worker(cluster: Cluster, before: Collection[tuple[str, int]] = ()) -> None:
    """Kill the first worker that opens another NPU than those of the ranks that serve, which are ``before``."""
    before = before or opened_npus(cluster).keys()
    deadline = time.monotonic() + LIMIT_S
    while not (new := opened_npus(cluster).keys() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    send_signal(cluster, 1, min(new)[1])


def wait_for_log(server: Server, pattern: str, answer: Future[httpx.Response] | None = None) -> None:
    """Wait until the log has ``pattern``. Fails where the request to scale is answered, with ``answer``, before."""
    deadline = time.monotonic() + LIMIT_S
    while not re.search(pattern, server._text()):
        server.check()
        assert answer is None or not answer.done(), answer.result().text
        assert time.monotonic() < deadline, f"not in the log: {pattern}"
        time.sleep(0.05)


@contextmanager
def scaling(server: Server, size: int) -> Iterator[Future[httpx.Response]]:
    """Request a scaling in another thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(request_scaling, server, size)


@contextmanager
def draining_server(cluster: Cluster, folder: Path) -> Iterator[Server]:
    """Start a server that finishes all requests between the preparation of a scaling and the commit."""
    with elastic_server(cluster, folder, VLLM_ELASTIC_EP_DRAIN_REQUESTS="1") as server:
        yield server


@contextmanager
def busy(server: Server) -> Iterator[threading.Event]:
    """Keep the server busy until the event is set, at the end at the latest."""
    stop = threading.Event()
    reader = threading.Thread(target=keep_busy, args=(server, stop))
    reader.start()
    try:
        yield stop
    finally:
        stop.set()
        reader.join()


@pytest.mark.slow
def test_a_new_rank_that_fails_while_the_others_connect_to_it_is_undone(tmp_path: Path) -> None:
    """They wait for it in HCCL until HCCL_CONNECT_TIMEOUT, and serve meanwhile."""
    faults = tmp_path / "faults"
    faults.write_text("")
    variables = {"SOFTNPU_FAULTS": f"@{faults}", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "SOFTNPU_FAULTS"}
    with (
        temporary_cluster("e2e-elastic-connect", 1, 4) as cluster,
        elastic_server(cluster, tmp_path, **variables) as server,
    ):
        faults.write_text("link_setup:rank=3,op=AllReduce,code=9")
        with scaling(server, 4) as answer:
            wait_for_log(server, "the engine core of data parallel rank 3 .* exited", answer)
            check_texts(server, 2)
            assert not answer.done(), answer.result().text
        faults.write_text("")
        assert answer.result().status_code == 500 and "VRA-343" in answer.result().text, answer.result().text
        check_scaled(server, 2)
        wait_for_npus(cluster, 1, [0, 1])
        scale(server, 4)


@pytest.mark.slow
def test_a_new_rank_that_dies_after_it_was_ready_is_undone(tmp_path: Path) -> None:
    """While the ranks that serve finish a request, before the commit."""
    with temporary_cluster("e2e-elastic-ready", 1, 4) as cluster, draining_server(cluster, tmp_path) as server:
        before = opened_npus(cluster).keys()
        with busy(server) as stop_reading, scaling(server, 4) as answer:
            wait_for_log(server, "waiting for requests to drain before scaling", answer)
            kill_new_worker(cluster, before)
            wait_for_log(server, r"event engine_failed engine=zen-moe/dp[23]")
            time.sleep(2)  # until the driver knows it too: the commit would begin, and all would end
            stop_reading.set()
        assert answer.result().status_code == 500 and "VRA-343" in answer.result().text, answer.result().text
        check_scaled(server, 2)
        wait_for_npus(cluster, 1, [0, 1])
        scale(server, 3)


def keep_busy(server: Server, stop: threading.Event) -> None:
    """Read texts, one after the other, until ``stop`` is set; the server may refuse to begin one."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LIMIT_S, max_retries=0)
    while not stop.is_set():
        options = {"ignore_eos": True}
        with suppress(openai.APIError, httpx.HTTPError):  # it refuses, or ends
            stream = client.completions.create(
                model=MOE.name, prompt=PROMPTS[0], max_tokens=450, stream=True, extra_body=options
            )
            for _ in stream:
                if stop.is_set():
                    stream.close()
                    break


@pytest.mark.slow
def test_a_death_in_the_commit_ends_all(tmp_path: Path) -> None:
    """No rank knows then which experts the others have. The first cause is in the log, and nothing is left.

    The new worker is stopped before the commit, which therefore cannot be over when it is killed.
    """
    with temporary_cluster("e2e-elastic-commit", 1, 4) as cluster, draining_server(cluster, tmp_path) as server:
        before = opened_npus(cluster).keys()
        with busy(server) as stop_reading, scaling(server, 4) as answer:
            wait_for_log(server, "waiting for requests to drain before scaling", answer)
            victim = min(opened_npus(cluster).keys() - before)[1]
            send_signal(cluster, 1, victim, signal.SIGSTOP)
            stop_reading.set()
            wait_for_log(server, "Committing prepared reconfiguration", answer)
            send_signal(cluster, 1, victim)
            wait_for_server_exit(server)
        assert isinstance(answer.exception(), httpx.HTTPError) or answer.result().status_code == 500
        assert "VRA-346" in server._text() and f"process {victim}" in server._text()
        check_no_leftovers(cluster)


@pytest.mark.slow
def test_a_death_of_a_rank_that_leaves_ends_all_or_nothing(tmp_path: Path) -> None:
    """All, where the others still need its experts; else it has only died before it has exited by itself."""
    options = ("--data-parallel-size", "3", "--eplb-config.num_redundant_experts", str(3 * EXPERTS_OF_A_RANK - EXPERTS))
    with (
        temporary_cluster("e2e-elastic-leave", 1, 3) as cluster,
        elastic_server(cluster, tmp_path, *options) as server,
    ):
        worker = next(pid for (_, pid), npus in opened_npus(cluster).items() if npus == [2])
        with scaling(server, 2) as answer:
            wait_for_log(server, "Committing prepared reconfiguration", answer)
            send_signal(cluster, 1, worker)
        if answer.exception() is None and answer.result().status_code == 200:
            check_scaled(server, 2)
            wait_for_npus(cluster, 1, [0, 1])
            scale(server, 3)
            return
        wait_for_server_exit(server)
        assert "VRA-346" in server._text() and "data parallel rank 2" in server._text()
        check_no_leftovers(cluster)


@pytest.mark.slow
def test_lost_ranks_are_restarted_with_the_others_at_the_present_size(tmp_path: Path) -> None:
    """One that has joined; afterwards the engine is scaled again."""
    recover = {"VLLM_RAY_ASCEND_RECOVER": "1"}
    with temporary_cluster("e2e-elastic-lost", 1, 4) as cluster, elastic_server(cluster, tmp_path, **recover) as server:
        assert request_scaling(server, 3).status_code == 200
        check_texts(server, 3)
        send_signal(cluster, *engine_core(cluster, 2))
        wait_for_event(server, RESTORED)
        wait_until(lambda: health(server) == 200, server)
        check_scaled(server, 3)
        scale(server, 4)
        scale(server, 2)
        wait_for_npus(cluster, 1, [0, 1])


@pytest.mark.slow
@pytest.mark.multinode
def test_an_engine_continues_with_the_ranks_whose_node_is_left(tmp_path: Path) -> None:
    """Without the node of two of four ranks, and with all four once the node is back."""
    recover = {"VLLM_RAY_ASCEND_RECOVER": "1"}
    options = (
        *("--data-parallel-size", "4", "--data-parallel-size-local", "2"),
        *("--eplb-config.num_redundant_experts", "8"),
    )
    with (
        temporary_cluster("e2e-elastic-left", 2, 2) as cluster,
        elastic_server(cluster, tmp_path, *options, **recover) as server,
    ):
        check_texts(server, 4)
        kill_raylet(cluster, 2)
        wait_for_event(server, RESTORED)
        wait_until(lambda: health(server) == 200, server)
        check_scaled(server, 2)
        assert "VRA-166" in server._text()
        manager.restart_ray(cluster, 2)
        scale(server, 4)
        assert opened_npus_by_node(cluster) == {1: [0, 1], 2: [0, 1]}


@pytest.mark.slow
def test_ranks_of_two_npus_each(tmp_path: Path) -> None:
    """Whole tensor parallel groups come and go."""
    with (
        temporary_cluster("e2e-elastic-tensor", 1, 6) as cluster,
        elastic_server(cluster, tmp_path, "--tensor-parallel-size", "2", "--elastic-ep-max-dp-size", "3") as server,
    ):
        check_scaled(server, 2, tensor=2)
        scale(server, 3, tensor=2)
        scale(server, 2, tensor=2)
        wait_for_npus(cluster, 1, [0, 1, 2, 3])


@pytest.mark.slow
def test_more_ranks_than_npus(tmp_path: Path) -> None:
    with temporary_cluster("e2e-elastic-npus", 1, 3) as cluster, elastic_server(cluster, tmp_path) as server:
        answer = request_scaling(server, 4)
        assert answer.status_code == 500 and "VRA-230" in answer.text, answer.text
        assert request_scaling(server, 5).status_code == 400
        assert request_scaling(server, 1).status_code == 400
        check_scaled(server, 2)
        scale(server, 3)


def held(cluster: Cluster, server: Server) -> dict[str, list[int]]:
    """Return counts of what a scaling could leave: in Ray, in rank 0's worker, and in each process of the engine."""
    worker = json.loads(call_workers(server, "resources"))
    found = {"ray": objects_in_ray(cluster), "memory": [worker["memory"]], "groups": [worker["groups"]]}
    for pid in find_cluster_processes(cluster):
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            title = " ".join(process.cmdline())
            if any(name in title for name in ("RayAscendWorkerProc", "EngineCoreActor", "DPCoordinator", "vllm serve")):
                files = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
                sockets = sum(file.startswith("socket:") for file in files)
                found[f"{title[:60]} {process.pid}"] = [sockets, len(files) - sockets, process.num_threads()]
    return found


def objects_in_ray(cluster: Cluster) -> list[int]:
    """Return the numbers of living actors and of placement groups."""
    left = json.loads(re.findall(r"LEFT (.*)", run_on_head(cluster, "-c", NOTHING_LEFT).stdout)[-1])
    return [len(left["actors"]), len(left["groups"])]


@pytest.mark.slow
def test_ten_cycles_leave_nothing_behind(tmp_path: Path) -> None:
    """What grows by one or more a cycle in the second half is a leak; pools of threads fill in the first."""
    with temporary_cluster("e2e-elastic-cycles", 1, 4) as cluster, elastic_server(cluster, tmp_path) as server:
        counts = []
        for _ in range(10):
            scale(server, 4)
            scale(server, 2)
            wait_for_npus(cluster, 1, [0, 1])
            counts.append(held(cluster, server))
        first, last = counts[4], counts[9]
        assert first.keys() == last.keys(), (first, last)
        assert first["ray"] == last["ray"] and first["memory"] == last["memory"] and first["groups"] == last["groups"]
        grown = {name: (first[name], last[name]) for name in first if max_growth(first[name], last[name]) >= 5}
        assert not grown, grown


def max_growth(first: Sequence[int], last: Sequence[int]) -> int:
    return max(after - before for before, after in zip(first, last, strict=True))
