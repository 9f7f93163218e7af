"""A LoRA adapter that a node lacks fails the request that needs it, and nothing else."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from demo.server import Server
from demo.train.recitation import DENSE
from tests.e2e.servers import SHORT, create_server

RANK = 8
ONE_KEPT = ("--enable-lora", "--max-loras", "1", "--max-cpu-loras", "1", "--max-lora-rank", str(RANK))
LIMIT_S = 300.0


def write_adapter(folder: Path, change: float = 0.0) -> None:
    """Write an adapter of DENSE's query projections, which changes nothing, or at random as much as ``change``."""
    folder.mkdir()
    tensors = {}
    random = np.random.default_rng(0)
    with safe_open(DENSE / "model.safetensors", "numpy") as model:
        for name in model.keys():  # noqa: SIM118 - no dictionary
            if name.endswith("self_attn.q_proj.weight"):
                outputs, inputs = model.get_slice(name).get_shape()
                adapted = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{adapted}.lora_A.weight"] = random.standard_normal((RANK, inputs), np.float32)
                tensors[f"{adapted}.lora_B.weight"] = change * random.standard_normal((outputs, RANK), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))


def run_on_node(cluster: Cluster, node: int, *command: str) -> None:
    subprocess.run(manager.node_command(cluster, node, list(command)), check=True, timeout=60)


def load(server: Server, name: str) -> httpx.Response:
    adapter = {"lora_name": name, "lora_path": f"/dev/shm/{name}"}  # each node has its own /dev/shm
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json=adapter, timeout=LIMIT_S)


def ask(server: Server, model: str) -> httpx.Response:
    request = {"model": model, "prompt": SHORT, "max_tokens": 5, "temperature": 0}
    return httpx.post(f"{server.url}/v1/completions", json=request, timeout=LIMIT_S)


@pytest.mark.slow
def test_a_request_fails_alone_whose_adapter_one_node_has_lost(two_nodes_of_one: Cluster, tmp_path: Path) -> None:
    """It was loaded, another one has taken its place, and a worker would read it again in a step."""
    write_adapter(tmp_path / "adapter")
    for node, names in ((1, ("first", "second", "lost")), (2, ("second", "lost"))):
        for name in names:
            run_on_node(two_nodes_of_one, node, "cp", "-r", str(tmp_path / "adapter"), f"/dev/shm/{name}")
    sizes = ("--tensor-parallel-size", "1", "--pipeline-parallel-size", "2")
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with create_server(two_nodes_of_one, DENSE, tmp_path / "log", *sizes, *ONE_KEPT, **variables) as server:
        server.wait_until_healthy()
        assert load(server, "first").status_code == 404  # the second node has never had it
        assert [load(server, name).status_code for name in ("lost", "second")] == [200, 200]
        assert [ask(server, name).status_code for name in ("lost", "second")] == [200, 200]

        run_on_node(two_nodes_of_one, 2, "rm", "-r", "/dev/shm/lost")
        refused = ask(server, "lost")
        assert refused.status_code == 404, refused.text
        text = f"VRA-387: LoRA adapter lost cannot be loaded again: node {two_nodes_of_one.nodes[1].address} has no "
        assert refused.json()["error"]["message"].startswith(text) and "/dev/shm/lost" in refused.text
        assert [ask(server, name).status_code for name in (DENSE.name, "second")] == [200, 200]

        run_on_node(two_nodes_of_one, 2, "cp", "-r", str(tmp_path / "adapter"), "/dev/shm/lost")
        assert ask(server, "lost").status_code == 200
