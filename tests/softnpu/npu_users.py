"""Users of NPUs that are no engines of ours: a Ray Serve application, actors and a task of other jobs and namespaces.

python npu_users.py      run by test_topology.py, in namespaces of its own
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import placement_group

MARKER = "RESULT"
OTHER_JOB = """
import sys, time, ray
ray.init("auto", namespace="training", log_to_driver=False)

@ray.remote(num_cpus=0, resources={"NPU": 0.5})
class Trainer:
    def ready(self):
        return True

trainers = [Trainer.options(name=f"trainer-{i}").remote() for i in range(2)]
ray.get([trainer.ready.remote() for trainer in trainers])
print("ready", flush=True)
sys.stdin.read()
"""


class Worker:
    """What an engine of another kind has in a replica."""

    def pid(self) -> int:
        return os.getpid()


class Model:
    """A replica that starts an actor in its placement group."""

    def __init__(self) -> None:
        self.worker = ray.remote(Worker).options(num_cpus=0, resources={"NPU": 1}).remote()

    async def __call__(self) -> int:
        return int(await self.worker.pid.remote())


def preprocess(started: str) -> None:
    """Hold an NPU until the driver ends."""
    Path(started).touch()
    time.sleep(3600)


def topology(*options: str) -> str:
    command = [sys.executable, "-m", "vllm_ray_ascend.cli.main", "topology", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def main() -> dict[str, Any]:
    ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    bundles = [{"CPU": 1}, {"NPU": 1}]
    model = serve.deployment(Model).options(placement_group_bundles=bundles, ray_actor_options={"num_cpus": 1})
    application = serve.run(model.bind(), name="chat", route_prefix=None)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_JOB],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    assert other.stdout is not None and other.stdout.readline() == b"ready\n"
    group = placement_group([{"NPU": 1}], name="later")
    ray.get(group.ready())
    started = Path("started")
    task = ray.remote(preprocess).options(num_cpus=0, resources={"NPU": 1}).remote(str(started.absolute()))
    while not started.exists():
        time.sleep(0.1)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    for _ in range(60):  # a task's event is in Ray's table after a second
        found = json.loads(topology("--json"))
        if not any(node["unknown"] for node in found["nodes"]):
            break
        time.sleep(0.5)
    result = {"json": found, "text": topology(), "worker": application.remote().result(), "trainer": other.pid}
    ray.cancel(task, force=True)
    other.kill()
    return result


if __name__ == "__main__":
    print(MARKER + json.dumps(main()), flush=True)
