"""Ray Serve LLM's own configuration classes, in a process whose platform is that of NPUs. Without a cluster."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from demo.install import RAY_PACKAGES, install_group
from tests.softnpu.processes import check_python

pytestmark = pytest.mark.softnpu

CODE = """
import json, os, types
from ray import serve
from ray.serve.llm import LLMConfig

def describe(rank=0, **options):
    serve.get_replica_context = lambda: types.SimpleNamespace(rank=types.SimpleNamespace(rank=rank))
    try:
        config = LLMConfig(model_loading_config={"model_id": "m"}, **options)
        engine = config.get_engine_config()
        if transfer := config.engine_kwargs.get("kv_transfer_config"):
            config.setup_engine_backend()
            return dict(transfer, backend=type(config.kv_connector_backend).__name__)
        return {
            "kind": config.accelerator_config.kind,
            "bundles": engine.placement_bundles,
            "options": engine.accelerator.get_remote_options(config.accelerator_type),
            "backend": engine.get_initialization_kwargs()["distributed_executor_backend"],
            "share": engine.get_runtime_env_with_local_env_vars()["env_vars"].get("VLLM_RAY_PER_WORKER_GPUS"),
        }
    except ValueError as error:
        return str(error)

print("RESULT" + json.dumps([describe(**options) for options in json.loads(os.environ["CASES"])]))
"""
NPU = {"CPU": 1, "NPU": 1}
SIZES = {side: {"tp_size": 1, "dp_size": 1} for side in ("prefill", "decode")}


def mooncake(
    role: str = "kv_producer", rank: int = 0, engine_kwargs: dict[str, Any] | None = None, **transfer: Any
) -> dict[str, Any]:
    """Return the options of a replica with Serve's ``rank`` and vllm-ascend's connector."""
    given = {"kv_connector": "MooncakeConnectorV1", "kv_role": role, "kv_connector_extra_config": SIZES, **transfer}
    return {"rank": rank, "engine_kwargs": {**(engine_kwargs or {}), "kv_transfer_config": given}}


CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "ranks": {"engine_kwargs": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}},
    "type": {"accelerator_type": "Ascend910B3"},
    "type of a GPU": {"accelerator_type": "A10G"},
    "NPUs and type of a GPU": {"placement_group_config": {"bundles": [NPU]}, "accelerator_type": "L4"},
    "GPUs and their type": {"placement_group_config": {"bundles": [{"GPU": 1}]}, "accelerator_type": "L4"},
    "bundles": {"placement_group_config": {"bundle_per_worker": NPU}},
    "bundles and ray": {
        "placement_group_config": {"bundles": [NPU]},
        "engine_kwargs": {"distributed_executor_backend": "ray"},
    },
    "bundles and mp": {
        "placement_group_config": {"bundles": [NPU]},
        "engine_kwargs": {"distributed_executor_backend": "mp"},
    },
    "bundles and type": {"placement_group_config": {"bundles": [NPU]}, "accelerator_type": "Ascend910_9391"},
    "share": {"placement_group_config": {"bundle_per_worker": {"CPU": 1, "NPU": 0.5}}},
    "gpus": {"placement_group_config": {"bundles": [{"GPU": 1}]}},
    "half gpus": {"placement_group_config": {"bundles": [{"GPU": 0.5}]}},
    "cpus": {"placement_group_config": {"bundles": [{"CPU": 1}]}},
    "tpu": {"accelerator_config": {"kind": "tpu"}, "placement_group_config": {"bundles": [NPU]}},
    "decode": mooncake("kv_consumer"),
    "fifth replica of prefill": mooncake("kv_producer", rank=4, engine_kwargs={"pipeline_parallel_size": 2}),
    "second rank": mooncake(rank=1, engine_kwargs={"data_parallel_rank": 1, "data_parallel_size": 2}),
    "first rank of a second group": mooncake(rank=2, engine_kwargs={"data_parallel_rank": 0, "data_parallel_size": 2}),
    "given": mooncake(rank=1, kv_port=21000, engine_id="mine"),
    "both": mooncake("kv_both"),
    "no sizes": mooncake(kv_connector_extra_config={}),
    "one of several": {
        "engine_kwargs": {
            "kv_transfer_config": {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {
                    "connectors": [
                        {"kv_connector": "MooncakeConnectorV1", "kv_connector_extra_config": SIZES},
                        {"kv_connector": "AscendStoreConnector"},
                    ]
                },
            }
        }
    },
    "unknown type": {"accelerator_type": "Ascent910"},
}


def read_configs(**environment: str) -> dict[str, Any]:
    """Return what each configuration means, by its name in CASES."""
    install_group("ray", Path(sys.prefix))
    path = os.pathsep.join([str(RAY_PACKAGES), os.environ["PYTHONPATH"]])
    output = check_python(CODE, PYTHONPATH=path, CASES=json.dumps(list(CASES.values())), **environment)
    found = next(line for line in output.splitlines() if line.startswith("RESULT"))
    return dict(zip(CASES, json.loads(found.removeprefix("RESULT")), strict=True))


def test_what_a_configuration_asks_of_the_cluster() -> None:
    found = read_configs()
    of_npus = {"kind": "gpu", "options": {"resources": {"NPU": 0.001}}, "backend": "ray", "share": None}
    assert found["nothing"] == {**of_npus, "bundles": [{"NPU": 1}]}
    assert found["ranks"] == {**of_npus, "bundles": [{"NPU": 1}] * 4}
    typed = {"NPU": 1, "accelerator_type:Ascend910B3": 0.001}
    options = {"resources": {"NPU": 0.001}, "accelerator_type": "Ascend910B3"}
    assert found["type"] == {**of_npus, "bundles": [typed], "options": options}
    assert found["type of a GPU"] == found["nothing"], "as in Ray's own examples"
    assert found["bundles"] == found["bundles and ray"] == {**of_npus, "bundles": [NPU]}
    assert found["NPUs and type of a GPU"] == found["bundles"]
    assert found["GPUs and their type"]["bundles"] == [{"GPU": 1, "accelerator_type:L4": 0.001}]
    assert "distributed_executor_backend != 'ray' is not allowed" in found["bundles and mp"]
    assert found["bundles and type"]["bundles"] == [{**NPU, "accelerator_type:Ascend910_9391": 0.001}]
    assert found["share"] == {**of_npus, "bundles": [{"CPU": 1, "NPU": 0.5}], "share": "0.5"}
    assert found["gpus"]["bundles"] == [{"GPU": 1}] and found["half gpus"]["share"] == "0.5"
    assert found["cpus"]["kind"] == "cpu" and found["cpus"]["backend"] == "mp"
    assert found["tpu"]["options"] == {"resources": {}} and found["tpu"]["backend"] == "ray"
    assert "Unsupported accelerator type: Ascent910" in found["unknown type"]

    assert found["decode"]["backend"] == "MooncakeBackend"
    ports = {name: each["kv_port"] for name, each in found.items() if "kv_port" in each}
    assert ports == {
        "decode": 38000,
        "fifth replica of prefill": 36008,
        "second rank": 36002,
        "first rank of a second group": 36004,
        "given": 21001,
    }, "each with room for the ports that Mooncake adds for its data parallel rank"
    assert all(found[name]["engine_id"].endswith(f"-{port}") for name, port in ports.items())
    assert found["given"]["engine_id"].startswith("mine-")
    assert found["both"].startswith("VRA-161: kv_role='kv_both'") and "kv_producer in prefill" in found["both"]
    assert found["no sizes"].startswith("VRA-162") and "lacks those of prefill and decode" in found["no sizes"]
    ours, other = found["one of several"]["kv_connector_extra_config"]["connectors"]
    assert ours["kv_port"] == 36000 and ours["engine_id"].endswith("-36000") and "kv_port" not in other


def test_switched_off_ray_is_as_it_was() -> None:
    found = read_configs(VLLM_RAY_ASCEND="0")
    assert found["nothing"]["bundles"] == [{"GPU": 1}] and found["nothing"]["options"] == {"num_gpus": 0.001}
    assert found["bundles"]["kind"] == "cpu" and found["bundles"]["backend"] == "mp"
    assert found["decode"]["backend"] == "DefaultConnectorBackend" and "kv_port" not in found["decode"]
    assert "Unsupported accelerator type: Ascend910B3" in found["type"]
