"""Ray Serve LLM and Ray Data LLM: the examples of the documents, on two nodes with two NPUs each."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster
from softnpu.cluster.processes import find_cluster_processes

from demo.train.recitation import DENSE, MOE, PROMPTS, zen_after, zen_text
from tests.e2e.conftest import ROOT, run_on_head
from tests.e2e.generate import MARKER
from tests.e2e.serve_client import CONCURRENT, URL
from tests.e2e.servers import check_topology, cluster_with_dashboard, read_topology
from tests.e2e.test_bad_input import check_nothing_left
from tests.e2e.test_death import check_no_leftovers, parent_of, send_signal

pytestmark = pytest.mark.e2e

EXAMPLES = ROOT / "examples"
MODEL_PATH = "/models/my-model"
"""In the examples: where a user's model is on every node."""
LIMIT_S = 600.0
LEAN = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_bytes": 32 << 20}
"""What fits this machine: examples say nothing of it."""
EAGER = {**LEAN, "enforce_eager": True}
PROCESSES = ("VLLM::", "ray::Serve", "ray::Proxy", "ray::RayAscend", "ray::RayWorker")
SHUTDOWN = "import ray\nfrom ray import serve\nray.init(log_to_driver=False)\nserve.shutdown()\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_with_dashboard("e2e-ray-llm", npus=2, cpus=8) as cluster:
        yield cluster


@contextlib.contextmanager
def on_head(cluster: Cluster, log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start Python on the head node, with every line of its output in the log; end it afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            manager.node_command(cluster, 1, [sys.executable, *command]),
            env={**manager.command_environment(cluster, 1, os.environ), "RAY_DEDUP_LOGS": "0"},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def started(cluster: Cluster, log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command on the head node; afterwards Serve is shut down, and nothing of it is left in the cluster."""
    with on_head(cluster, log, *command) as process:
        try:
            yield process
        finally:
            done = run_on_head(cluster, "-c", SHUTDOWN)
            process.terminate()
            process.wait(60)
    assert done.returncode == 0, done.stderr[-3000:]
    check_no_leftovers(cluster)
    assert not serve_processes(cluster)


def serve_processes(cluster: Cluster) -> list[str]:
    """Return the command lines of Serve's and the engines' processes, on all nodes."""
    found = []
    for pid in find_cluster_processes(cluster):
        with contextlib.suppress(OSError):  # ended meanwhile
            found.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " "))
    return [line for line in found if line.startswith(PROCESSES)]


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    """Return what ``condition`` returns once that is true. Fails where the command fails or nothing comes in time."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        text = log.read_text(errors="replace")
        assert process.poll() in (None, 0) and time.monotonic() < deadline, text[-6000:]
        assert "DEPLOY_FAILED" not in text, text[-6000:]
        time.sleep(2)
    return found


def wait_for_application(cluster: Cluster, engines: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until so many engines are ready, and the application answers."""
    wait_for_engines(engines, process, log)
    probe = f"import urllib.request; urllib.request.urlopen('{URL}/models').read()"
    wait_until(lambda: run_on_head(cluster, "-c", probe).returncode == 0, process, log)


def wait_for_engines(count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until so many engines have said that they are ready."""
    ready = re.compile(r"vllm-ray-ascend \S+ ready: ")
    wait_until(lambda: len(ready.findall(log.read_text(errors="replace"))) >= count, process, log)


def used_npus(engines: Sequence[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Return the NPUs of all ranks: the address of the node, and the physical number."""
    return {(rank["address"], rank["physical"]) for engine in engines for rank in engine["ranks"]}


def kill(cluster: Cluster, rank: Mapping[str, Any]) -> None:
    """Kill the process of a rank of the topology."""
    node = next(node.index for node in cluster.nodes if node.address == rank["address"])
    send_signal(cluster, node, rank["pid"], signal.SIGKILL)


def kill_parent(cluster: Cluster, engine: Mapping[str, Any]) -> None:
    """Kill the process above an engine core of the topology."""
    node = next(node.index for node in cluster.nodes if node.address == engine["address"])
    send_signal(cluster, node, parent_of(cluster, node, engine["pid"]), signal.SIGKILL)


def socket_files() -> set[Path]:
    """Return the files of vLLM's sockets, which the nodes have in one folder."""
    return {path for path in Path("/tmp").glob("*-*-*-*-*") if path.is_socket()}


def check_answers(cluster: Cluster) -> None:
    """Check the model's name, a text that is streamed, and those of many simultaneous requests."""
    done = run_on_head(cluster, "-m", "tests.e2e.serve_client")
    found = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    answers = json.loads(found[-1][len(MARKER) :])
    assert answers["models"] == ["my-model"]
    assert "".join(answers["streamed"]) == zen_after(PROMPTS[-1]) and len(answers["streamed"]) > 10
    assert answers["texts"] == [zen_after(PROMPTS[-1 - each % 2]) for each in range(CONCURRENT)]


def deploy(
    tmp_path: Path,
    example: str,
    model: Path,
    engine_kwargs: Mapping[str, Any],
    change: Callable[[dict[str, Any]], None] = lambda llm_config: None,
) -> list[str]:
    """Return the words of `serve run` with an example's YAML for ``model``; ``change`` is called with each config."""
    config = yaml.safe_load((EXAMPLES / "serve" / example).read_text().replace(MODEL_PATH, str(model)))
    for llm_config in configs_of(config):
        llm_config["engine_kwargs"] = {**engine_kwargs, **llm_config.get("engine_kwargs", {})}
        change(llm_config)
    path = tmp_path / example
    path.write_text(yaml.safe_dump(config))
    return [str(Path(sys.executable).parent / "serve"), "run", str(path)]


def configs_of(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every LLMConfig in an application's YAML."""
    if isinstance(value, dict) and "model_loading_config" in value:
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from configs_of(each)


def test_an_unchanged_script_serves_over_two_nodes_with_our_executor(cluster: Cluster, tmp_path: Path) -> None:
    log, sockets = tmp_path / "app.log", socket_files()
    with started(cluster, log, str(EXAMPLES / "serve/app.py"), str(DENSE)) as process:
        wait_for_application(cluster, 1, process, log)
        check_answers(cluster)
        (engine,) = check_topology(cluster)
        assert sorted((rank["address"], rank["physical"]) for rank in engine["ranks"]) == [
            (node.address, physical) for node in cluster.nodes for physical in (0, 1)
        ]
        assert re.search(r"executor class: .*vllm_ray_ascend\.executor\.executor\.RayAscendExecutor", log.read_text())
    assert not socket_files() - sockets, "of the replica"


@pytest.mark.slow
def test_replicas_on_npus_of_their_own_and_one_that_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "replicas.log"
    with started(cluster, log, *deploy(tmp_path, "replicas.yaml", DENSE, EAGER)) as process:
        wait_for_application(cluster, 2, process, log)
        check_answers(cluster)
        engines = check_topology(cluster)
        assert len(used_npus(engines)) == 2
        sockets = len(socket_files())
        (rank,) = engines[0]["ranks"]
        kill(cluster, rank)
        wait_for_engines(3, process, log)
        wait_until(lambda: len(read_topology(cluster)["engines"]) == 2, process, log)
        wait_until(lambda: len(socket_files()) == sockets, process, log)
        check_answers(cluster)
        now = check_topology(cluster)
        actors = {each["actor"] for engine in now for each in engine["ranks"]}
        assert rank["actor"] not in actors and engines[1]["ranks"][0]["actor"] in actors
        assert len(used_npus(now)) == 2

        kill_parent(cluster, engines[1])  # of the engine core: the replica itself
        wait_for_engines(4, process, log)
        wait_until(lambda: len(read_topology(cluster)["engines"]) == 2, process, log)
        check_answers(cluster)
        assert len(used_npus(check_topology(cluster))) == 2


@pytest.mark.slow
def test_two_replicas_share_an_npu(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "shares.log"

    def place(llm_config: dict[str, Any]) -> None:  # else Ray may choose two nodes
        llm_config["placement_group_config"]["bundle_per_worker"][f"node:{cluster.nodes[1].address}"] = 0.001

    run = deploy(tmp_path, "shares.yaml", DENSE, EAGER, place)
    with started(cluster, log, *run) as process:
        wait_for_application(cluster, 2, process, log)
        check_answers(cluster)
        engines = read_topology(cluster)["engines"]
        assert len(used_npus(engines)) == 1


@pytest.mark.slow
def test_data_parallel_ranks_of_a_mixture_of_experts(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "dp.log"
    with started(cluster, log, *deploy(tmp_path, "data_parallel.yaml", MOE, EAGER)) as process:
        wait_for_application(cluster, 2, process, log)
        check_answers(cluster)
        engines = read_topology(cluster)["engines"]
        assert sorted(len(engine["ranks"]) for engine in engines) == [2, 2]
        check_topology(cluster)


@pytest.mark.slow
def test_prefill_on_one_node_decode_on_the_other(cluster: Cluster, tmp_path: Path) -> None:
    log, notes_file, store = tmp_path / "pd.log", tmp_path / "notes", tmp_path / "store"
    store.mkdir()

    def connect(llm_config: dict[str, Any]) -> None:  # Mooncake needs hardware
        llm_config["engine_kwargs"]["kv_transfer_config"] |= {
            "kv_connector": "FolderConnector",
            "kv_connector_module_path": "tests.e2e.folder_connector",
            "kv_connector_extra_config": {"shared_storage_path": str(store), "notes": str(notes_file)},
        }
        llm_config["placement_group_config"] = {"bundle_per_worker": {"CPU": 6, "NPU": 1}}  # no second one on a node

    run = deploy(tmp_path, "prefill_decode.yaml", DENSE, {**EAGER, "enable_prefix_caching": False}, connect)
    with started(cluster, log, *run) as process:
        wait_for_application(cluster, 2, process, log)
        prompt = zen_text().rpartition("\n")[0] + "\n"
        done = run_on_head(cluster, "-m", "tests.e2e.serve_client", prompt)
        assert f"TEXT {zen_after(prompt)!r}" in done.stdout, done.stdout + done.stderr[-3000:]
    notes = {tuple(line.split()) for line in notes_file.read_text().splitlines()}
    stored, loaded = (
        {(layer, tokens): node for *found, layer, tokens, node in notes if found == wanted}
        for wanted in (["kv_producer", "stored"], ["kv_consumer", "loaded"])
    )
    assert len(loaded) >= 4 and loaded.keys() <= stored.keys(), notes
    assert not set(stored.values()) & set(loaded.values()), "on different nodes"


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline", "engines"), [(1, 1, 2), (2, 1, 2), (1, 2, 1)])
def test_datasets_with_engines_of_several_sizes(
    cluster: Cluster, tmp_path: Path, tensor: int, pipeline: int, engines: int
) -> None:
    sizes = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    with dataset(cluster, tmp_path / "log", engines, **sizes) as (process, log):
        check_rows(process, log)
        ranks = re.findall(r"event engine_ready \S+ ranks=(\d+)", log.read_text(errors="replace"))
        assert ranks == [str(tensor * pipeline)] * (engines if tensor * pipeline > 1 else 0), "one rank is without Ray"
    check_nothing_left(cluster)


@pytest.mark.slow
def test_a_dataset_whose_engine_dies_in_the_middle(cluster: Cluster, tmp_path: Path) -> None:
    with dataset(cluster, tmp_path / "log", 1, tensor_parallel_size=2) as (process, log):
        wait_until(lambda: MARKER in log.read_text(errors="replace"), process, log)
        (engine,) = read_topology(cluster)["engines"]
        rank = engine["ranks"][-1]
        kill(cluster, rank)
        check_rows(process, log)
        wait_for_engines(2, process, log)
    check_nothing_left(cluster)


DATASET = [prompt for prompt in PROMPTS for _ in range(8)]


@contextlib.contextmanager
def dataset(cluster: Cluster, log: Path, engines: int, **sizes: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start a dataset on the head node, with engines of these sizes; what it prints is in the log."""
    options = {"model": str(DENSE), "prompts": DATASET, "concurrency": engines, **EAGER, **sizes}
    with on_head(cluster, log, "-m", "tests.e2e.data_batch", json.dumps(options)) as process:
        yield process, log


def check_rows(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the end, and check that every row came once, with the right text."""
    code = process.wait(LIMIT_S)
    text = log.read_text(errors="replace")
    assert code == 0, text[-6000:]
    rows = [json.loads(line[len(MARKER) :]) for line in text.splitlines() if line.startswith(MARKER)]
    assert sorted(rows) == sorted([prompt, zen_after(prompt)] for prompt in DATASET)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "scales"),
    [("weight_transfer.py", [1, 0, 1]), ("colocated.py", [1, 0, 1]), ("direct.py", [1, 0, 1, 1])],
)
def test_a_trainer_sends_new_weights_to_its_engines(cluster: Cluster, example: str, scales: list[int]) -> None:
    done = run_on_head(cluster, str(EXAMPLES / "rl" / example), str(DENSE))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    texts = [ast.literal_eval(text) for text in re.findall(r"^scale \d: (.*)$", done.stdout, re.MULTILINE)]
    right = zen_after("Beautiful is better than ugly.\n")
    assert [right.startswith(text) and len(text) > 100 for text in texts] == list(map(bool, scales)), texts
    check_nothing_left(cluster)


@pytest.mark.slow
def test_engines_take_the_next_update_of_their_weights_after_one_that_fails(cluster: Cluster) -> None:
    done = run_on_head(cluster, "-m", "tests.e2e.weight_updates", str(DENSE))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [ast.literal_eval(line) for line in re.findall(r"^UPDATE (.*)$", done.stdout, re.MULTILINE)]
    right = zen_after("Beautiful is better than ugly.\n")
    assert all(right.startswith(text) and len(text) > 100 for _, _, text in found), found
    errors = {
        "sent": [""] * 2,
        "the trainer fails in an update": ["ArithmeticError: the trainer's own error"] * 6,
        "an engine is gone": ["ActorDiedError"],
        "its trainer is gone in an update": [""],
    }
    assert [event for event, _, _ in found] == [event for event, each in errors.items() for _ in each]
    assert all(
        error.startswith(errors[event][0]) and bool(error) == bool(errors[event][0]) for event, error, _ in found
    )
    check_nothing_left(cluster)


def test_a_batch_of_prompts_with_ray_data(cluster: Cluster) -> None:
    done = run_on_head(cluster, str(EXAMPLES / "data/batch.py"), str(DENSE), PYTHONPATH=os.environ["PYTHONPATH"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith(("'", '"'))]
    for prompt in ("Beautiful is better than ugly.\n", "Explicit is better than implicit.\n"):
        texts = [text for text in printed if text.startswith(prompt)]
        assert len(texts) == 1 and len(texts[0]) > len(prompt) + 100, done.stdout[-3000:]
        assert (prompt + zen_after(prompt)).startswith(texts[0]), texts
    assert re.search(r"vllm-ray-ascend \S+ ready: .*, 2 NPUs; ", done.stdout + done.stderr), "not our executor"
    check_nothing_left(cluster)
