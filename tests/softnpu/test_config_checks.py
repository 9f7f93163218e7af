"""Our checks of a vLLM config, made by vLLM and vllm-ascend themselves."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import WeightTransferConfig
from vllm.config.multimodal import MultiModalConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.worker.worker_base import WorkerWrapperBase

from demo.train.recitation import DENSE
from vllm_ray_ascend.errors import SettingError, SpeculationError

N_GRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}


@pytest.fixture(autouse=True)
def own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # vllm-ascend sets variables where it creates a config


def create_config(model: str = str(DENSE), **options: Any) -> Any:
    options = {"distributed_executor_backend": "ray"} | options
    return EngineArgs(model=model, dtype="float32", max_model_len=256, **options).create_engine_config()


def test_speculation_with_stages_is_refused() -> None:
    """Where vllm-ascend has fixed this, it fails: the refusal and its entry in docs/errors.md can go."""
    with pytest.raises(SpeculationError, match=r"VRA-114: .* should_advance"):
        create_config(speculative_config=N_GRAM, pipeline_parallel_size=2)


def test_speculation_without_stages_is_not_refused() -> None:
    assert create_config(speculative_config=N_GRAM).speculative_config.method == "ngram"


def test_a_cache_of_inputs_in_shared_memory_is_refused_before_the_workers_do() -> None:
    """Where vLLM's worker accepts it, this fails: the refusal and its entry in docs/errors.md can go."""
    config = create_config()
    config.model_config.multimodal_config = MultiModalConfig(mm_processor_cache_type="shm")
    with pytest.raises(ValueError, match="Missing `shared_worker_lock` argument from executor"):
        WorkerWrapperBase(0, 0).init_worker([{"vllm_config": config, "shared_worker_lock": None}])
    with pytest.raises(SettingError, match=r"VRA-385: .* --mm-processor-cache-type lru"):
        current_platform.check_and_update_config(config)
    config.model_config.multimodal_config = MultiModalConfig(mm_processor_cache_type="lru")
    current_platform.check_and_update_config(config)


PYTORCH_WEIGHTS: dict[str, Any] = {"additional_config": {"weight_nz_mode": 0}}


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("--enable-sleep-mode", {"enable_sleep_mode": True}),
        ("--weight-transfer-config", {"weight_transfer_config": WeightTransferConfig(backend="hccl")}),
    ],
)
def test_weights_that_are_to_change_in_place_need_the_format_of_pytorch(option: str, options: dict[str, Any]) -> None:
    """Where vllm-ascend accepts the other one, the refusal and its entry in docs/errors.md can go."""
    with pytest.raises(ValueError, match=f"VRA-147: {option} cannot work with weight_nz_mode=1"):
        create_config(**options)
    assert create_config(**options, **PYTORCH_WEIGHTS).additional_config["weight_nz_mode"] == 0
    create_config(**options, distributed_executor_backend="mp")


def test_a_relative_path_is_absolute_in_the_config_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DENSE.parent)
    config = create_config(DENSE.name).model_config
    assert (config.model, config.tokenizer) == (str(DENSE), str(DENSE))
    assert config.served_model_name == DENSE.name


def test_a_model_on_one_node_keeps_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own backend starts its workers in the same folder."""
    monkeypatch.chdir(DENSE.parent)
    assert create_config(DENSE.name, distributed_executor_backend="mp").model_config.model == DENSE.name


def test_vllm_s_older_executor_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    os.environ["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] = "0"
    create_config()
    assert "VRA-115: VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 selects" in caplog.text


@pytest.mark.parametrize(("v2", "error"), [("0", EngineDeadError), ("1", ConnectionError)])
def test_only_workers_of_ours_are_asked_for_adapters(v2: str, error: type[Exception]) -> None:
    """Those of vLLM's older executor could not answer, which would fail the request."""
    os.environ["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] = v2

    async def ask_workers(method: str, args: tuple[str, str]) -> None:
        raise ConnectionError

    engine: Any = type("Engine", (SimpleNamespace,), {"__hash__": object.__hash__})(
        vllm_config=create_config(enable_lora=True), errored=True, collective_rpc=ask_workers
    )
    from vllm.v1.engine.async_llm import AsyncLLM  # by now plugins are loaded

    params: Any = None
    with pytest.raises(error):
        asyncio.run(AsyncLLM.add_request(engine, "r", "text", params, lora_request=LoRARequest("mine", 1, "/gone")))
