"""Engines that a program makes itself, in tasks, in actors and in a class of Ray Data, and what follows their death."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from demo.train.recitation import DENSE, PROMPTS, zen_after
from tests.e2e.conftest import run_on_head
from tests.e2e.generate import MARKER
from tests.e2e.servers import cluster_with_dashboard, read_topology
from tests.e2e.test_death import check_no_leftovers, send_signal
from tests.e2e.test_ray_llm import EXAMPLES, LIMIT_S, kill, on_head, wait_for_engines, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROWS = [prompt for prompt in PROMPTS for _ in range(16)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_with_dashboard("e2e-batch", npus=1, cpus=8) as cluster:
        yield cluster


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that Ray Data has written."""
    lines = [line for path in sorted(folder.glob("*.json")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def check_rows(folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the program's end, and check that every row was written once, with the right text."""
    code = process.wait(LIMIT_S)
    assert code == 0, log.read_text(errors="replace")[-6000:]
    found = sorted((row["prompt"], row["text"]) for row in read_rows(folder))
    assert found == sorted((prompt, zen_after(prompt)) for prompt in ROWS)


def own_class(tmp_path: Path) -> tuple[list[str], Path, Path]:
    """Return the words of the example, its output folder, and the log."""
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ROWS))
    return [str(EXAMPLES / "data/own_class.py"), str(DENSE), str(prompts), str(folder)], folder, tmp_path / "log"


@pytest.mark.parametrize("victim", ["worker", "engine core", "actor"])
def test_a_class_of_ray_data_whose_engine_dies_in_the_middle(cluster: Cluster, tmp_path: Path, victim: str) -> None:
    """The actor starts again in its placement group: with all NPUs in it, there is no other place."""
    command, folder, log = own_class(tmp_path)
    with on_head(cluster, log, *command) as process:
        wait_until(lambda: folder.is_dir() and read_rows(folder), process, log)
        (engine,) = read_topology(cluster)["engines"]
        assert len({rank["address"] for rank in engine["ranks"]}) == 2
        kill_part(cluster, engine, victim)
        check_rows(folder, process, log)
        wait_for_engines(2, process, log)
    check_no_leftovers(cluster)


def kill_part(cluster: Cluster, engine: dict[str, Any], victim: str) -> None:
    """Kill a worker of the engine, its core, or the actor that made it: the parent of its core."""
    node = next(node.index for node in cluster.nodes if node.address == engine["address"])
    if victim == "worker":
        kill(cluster, engine["ranks"][-1])
    elif victim == "engine core":
        send_signal(cluster, node, engine["pid"], signal.SIGKILL)
    else:
        shell = f"kill -KILL $(sed -n 's/^PPid:\\s*//p' /proc/{engine['pid']}/status)"
        command = manager.node_command(cluster, node, ["sh", "-c", shell])
        subprocess.run(command, check=True, timeout=60)


IN_RAY = """
import json, os, sys
import ray

def complete(executor, tensor):
    from vllm import LLM, SamplingParams
    llm = LLM({model!r}, dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=16 << 20,
        tensor_parallel_size=tensor, distributed_executor_backend=executor)
    (output,) = llm.generate([{prompt!r}], SamplingParams(temperature=0, max_tokens=100), use_tqdm=False)
    return output.outputs[0].text

class Completer:
    def complete(self, *arguments):
        return complete(*arguments)

ray.init()
texts = []
for executor, tensor, options in (
    (None, 1, {{"num_cpus": 1, "resources": {{"NPU": 1}}}}),
    ("ray", 2, {{"num_cpus": 1}}),
):
    task = ray.remote(max_calls=1, **options)(complete)  # Ray's default for GPUs, not for NPUs
    texts.append(ray.get(task.remote(executor, tensor)))
    actor = ray.remote(Completer).options(**options).remote()
    texts.append(ray.get(actor.complete.remote(executor, tensor)))
    del actor
print({marker!r} + json.dumps(texts))
"""


def test_engines_in_tasks_and_actors(cluster: Cluster) -> None:
    """With one NPU of the task or actor itself, and with two that the engine takes from the cluster."""
    done = run_on_head(cluster, "-c", IN_RAY.format(model=str(DENSE), prompt=PROMPTS[-1], marker=MARKER))
    found = [line for line in done.stdout.splitlines() if line.startswith(MARKER)]
    assert done.returncode == 0 and found, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(found[-1][len(MARKER) :]) == [zen_after(PROMPTS[-1])] * 4
    # Ray kills an actor's children, Python's resource tracker among them: a lock of a spawned process, such as tqdm's,
    # then keeps its name, of 32 bytes, with vLLM or without.
    check_no_leftovers(cluster, known="sem.mp-")
