"""Ray jobs: `ray job submit -- vllm serve`. The job's folder, modules and variables reach the workers of every node."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from demo.train.recitation import DENSE, zen_after
from tests.e2e.servers import LEAN, SHORT, cluster_with_dashboard, opened_npus, read_topology
from tests.e2e.test_bad_input import check_nothing_left
from tests.e2e.test_death import send_signal
from tests.e2e.test_serve import find_free_port

LIMIT_S = 600.0
EXTENSION = """
import os, marked_module
class Facts:
    def job_facts(self):
        return [os.environ["JOB_MARK"], marked_module.MARK, os.path.exists("model/config.json")]
"""
SCRIPT = """
import time, ray
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    ray.init()
    llm = LLM("model", dtype="float32", distributed_executor_backend="ray", pipeline_parallel_size=2, max_model_len=256,
        enforce_eager=True, kv_cache_memory_bytes=16 << 20, worker_extension_cls="job_extension.Facts")
    print("FACTS", llm.collective_rpc("job_facts"))
    (answer,) = llm.generate({prompt!r}, SamplingParams(temperature=0, max_tokens=100))
    print("TEXT", answer.outputs[0].text, flush=True)
    time.sleep(600)
"""


@dataclasses.dataclass(frozen=True)
class Jobs:
    """`ray job` on the head of a cluster."""

    cluster: Cluster
    address: str
    environment: Mapping[str, str]

    def run(self, *command: str) -> str:
        """Return the output of `ray job` with the command's words."""
        verb, *rest = command
        line = [sys.executable, "-m", "ray.scripts.scripts", "job", verb, "--address", self.address, *rest]
        done = subprocess.run(
            manager.node_command(self.cluster, 1, line),
            env=manager.command_environment(self.cluster, 1, self.environment),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def submit(self, name: str, folder: Path, *entrypoint: str, **runtime_env: Any) -> None:
        options = ("--no-wait", "--submission-id", name, "--working-dir", str(folder))
        self.run("submit", *options, "--runtime-env-json", json.dumps(runtime_env), "--", *entrypoint)

    def status(self, name: str) -> str:
        """Return a job's status in lower case, and its message."""
        return self.run("status", name).lower()

    def wait_for(self, name: str, text: str, *, in_logs: bool = False) -> str:
        """Return a job's status, or its logs, once that has ``text``. Fails where the job ends before."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            status = self.status(name)
            found = self.run("logs", name) if in_logs else status
            if text in found:
                return found
            ended = any(end in status for end in ("failed", "succeeded", "stopped"))
            assert not ended and time.monotonic() < deadline, found[-4000:] + self.run("logs", name)[-6000:]
            time.sleep(2)


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Two nodes with an NPU each and Ray's dashboard."""
    with cluster_with_dashboard("e2e-jobs", npus=1) as cluster:
        yield Jobs(cluster, f"http://{cluster.nodes[0].address}:8265", dict(os.environ))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder: the model, an extension of the workers, a script; beside it a module."""
    made = tmp_path / "folder"
    made.mkdir()
    (made / "model").mkdir()
    for path in DENSE.iterdir():
        (made / "model" / path.name).write_bytes(path.read_bytes())
    (made / "job_extension.py").write_text(EXTENSION)
    (made / "script.py").write_text(SCRIPT.replace("{prompt!r}", repr(SHORT)))
    (tmp_path / "modules" / "marked_module").mkdir(parents=True)
    (tmp_path / "modules" / "marked_module" / "__init__.py").write_text('MARK = "from py_modules"')
    return made


def runtime_env(folder: Path) -> dict[str, Any]:
    variables = {"JOB_MARK": "from env_vars", "VLLM_SERVER_DEV_MODE": "1"}
    return {"py_modules": [str(folder.parent / "modules" / "marked_module")], "env_vars": variables}


def wait_until_ended(jobs: Jobs) -> None:
    deadline = time.monotonic() + LIMIT_S
    while read_topology(jobs.cluster)["engines"] or opened_npus(jobs.cluster):
        assert time.monotonic() < deadline
        time.sleep(1)
    check_nothing_left(jobs.cluster)


def listed_events(jobs: Jobs) -> list[str]:
    """Return the messages of Ray's events as the dashboard shows them.

    `ray list cluster-events` cannot sort a job's among those of a worker that has died (patches/ray/0006).
    """
    events = httpx.get(f"{jobs.address}/events", timeout=LIMIT_S).json()["data"]["events"]
    return [event["message"] for each in events.values() for event in each]


def scraped_metrics(jobs: Jobs) -> str:
    """Return what Prometheus gets of Ray's agents, at the addresses that Ray lists for it."""
    listed = jobs.cluster.temp_dir(jobs.cluster.nodes[0]) / "prom_metrics_service_discovery.json"
    addresses = [address for group in json.loads(listed.read_text()) for address in group["targets"]]
    return "".join(httpx.get(f"http://{address}/metrics", timeout=LIMIT_S).text for address in addresses)


def wait_for_metric(jobs: Jobs, pattern: str) -> None:
    """Wait until Ray's agents show a metric; an engine gives it to Ray every few seconds."""
    deadline = time.monotonic() + LIMIT_S
    while not re.search(pattern, text := scraped_metrics(jobs)):
        shown = sorted({line.split("{")[0] for line in text.splitlines() if "vllm_ray_ascend" in line})
        assert time.monotonic() < deadline, f"{pattern} is not among {shown}"
        time.sleep(2)


@pytest.mark.slow
def test_a_server_whose_engine_fails_fails_its_job(jobs: Jobs, folder: Path) -> None:
    """It has its model, by a relative path, and its modules and variables from the job, on both nodes."""
    port = find_free_port()
    sizes = ("--distributed-executor-backend", "ray", "--dtype", "float32", *LEAN, "--pipeline-parallel-size", "2")
    serve = ("vllm", "serve", "model", "--host", "0.0.0.0", "--port", str(port), *sizes)
    jobs.submit("server", folder, *serve, "--worker-extension-cls", "job_extension.Facts", **runtime_env(folder))
    jobs.wait_for("server", "Application startup complete", in_logs=True)

    url = f"http://{jobs.cluster.nodes[0].address}:{port}"
    facts = httpx.post(f"{url}/collective_rpc", json={"method": "job_facts"}, timeout=LIMIT_S).json()["results"]
    assert facts == 2 * [["from env_vars", "from py_modules", True]]
    request = {"model": "model", "prompt": SHORT, "max_tokens": 100, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=request, timeout=LIMIT_S)
    assert answer.json()["choices"][0]["text"] == zen_after(SHORT)
    wait_for_metric(jobs, r'(?m)^ray_vllm_ray_ascend_ranks_alive\{.*model_name="model".*\} 2(\.0)?$')

    second = jobs.cluster.nodes[1].address
    (engine,) = read_topology(jobs.cluster)["engines"]
    send_signal(jobs.cluster, 2, next(rank["pid"] for rank in engine["ranks"] if rank["address"] == second))
    assert "exit code 1" in jobs.wait_for("server", "failed")
    wait_until_ended(jobs)
    assert {"engine_ready", "engine_failed"} <= {message.split()[0] for message in listed_events(jobs)}


@pytest.mark.slow
def test_a_script_under_uv_has_the_environment_of_its_job_and_can_be_stopped(jobs: Jobs, folder: Path) -> None:
    """It joins Ray itself, by which its engine's process has the job's environment twice."""
    uv = ("uv", "run", "--no-project", "--python", sys.executable)
    jobs.submit("script", folder, *uv, "python", "script.py", **runtime_env(folder))
    logs = jobs.wait_for("script", "TEXT", in_logs=True)
    assert f"FACTS {2 * [['from env_vars', 'from py_modules', True]]}" in logs
    assert f"TEXT {zen_after(SHORT)}" in logs
    jobs.run("stop", "script")
    assert "stopped" in jobs.status("script")
    wait_until_ended(jobs)
