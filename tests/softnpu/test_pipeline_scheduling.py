"""vLLM's own scheduler with vllm-ascend's patches for pipelines: a request has one decode in flight at a time."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vllm_ascend.patch.platform.patch_pp_mtp as ascend_patch
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from demo.train.recitation import DENSE
from vllm_ray_ascend.compat.ascend import block_reschedule_until_token
from vllm_ray_ascend.compiled_graph.executor import is_empty_step

STAGES, CHUNK, BLOCK = 2, 16, 16
PROMPT, WANTED = 3 * CHUNK + 5, 6


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncScheduler]:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # vllm-ascend sets variables where it creates a config
    with create_scheduler() as created:
        yield created


@contextlib.contextmanager
def create_scheduler() -> Iterator[AsyncScheduler]:
    """Create the scheduler of an engine with two pipeline stages."""
    config = EngineArgs(
        model=str(DENSE),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=CHUNK,
        pipeline_parallel_size=STAGES,
        distributed_executor_backend="ray",
        block_size=BLOCK,
        enable_prefix_caching=False,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 64
    cache = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    with set_current_vllm_config(config):
        yield AsyncScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], cache)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )


def max_decodes_in_flight(scheduler: Any) -> int:
    """Run a request with a batch for every stage, as an engine does; return its most tokens in flight at once.

    Each batch that ends a prompt, or follows it, generates a token.
    """
    request = Request("r", list(range(1, PROMPT + 1)), SamplingParams(max_tokens=WANTED, ignore_eos=True), None)
    scheduler.add_request(request)
    in_flight: deque[Any] = deque()
    most = 0
    while scheduler.has_unfinished_requests():
        batch = scheduler.schedule()
        if batch.total_num_scheduled_tokens:
            in_flight.append((batch, not request.is_prefill_chunk))
            most = max(most, sum(decoding for _, decoding in in_flight))
        if len(in_flight) == STAGES or not batch.total_num_scheduled_tokens:
            done, decoding = in_flight.popleft()
            tokens = [[7] if decoding else []]
            scheduler.update_from_output(done, ModelRunnerOutput(["r"], {"r": 0}, tokens, None, {}, []))
    assert request.num_output_tokens == WANTED
    return most


def test_a_prompt_in_chunks_has_one_decode_in_flight(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vllm-ascend has fixed this, the second half fails: block_reschedule_until_token is obsolete then."""
    block_reschedule_until_token(sys.modules[ascend_patch.__name__])
    assert max_decodes_in_flight(scheduler) == 1
    monkeypatch.setattr(Scheduler, "update_from_output", Scheduler.update_from_output.__wrapped__)
    assert max_decodes_in_flight(scheduler) == STAGES


def test_a_step_behind_the_only_request_is_empty(scheduler: Any) -> None:
    """The compiled graph's executor does not send it to the workers; that the request has ended is sent."""
    scheduler.add_request(Request("r", [1, 2, 3], SamplingParams(max_tokens=1), None))
    first, behind = scheduler.schedule(), scheduler.schedule()
    assert not is_empty_step(first)
    assert is_empty_step(behind), behind
    scheduler.update_from_output(first, ModelRunnerOutput(["r"], {"r": 0}, [[7]], None, {}, []))
    assert not scheduler.has_unfinished_requests()
    assert not is_empty_step(scheduler.schedule())
