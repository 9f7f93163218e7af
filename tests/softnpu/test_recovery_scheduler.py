"""Recovery with vLLM's own scheduler: new workers hold nothing, and the scheduler must not believe that they do."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.cache import MultiModalProcessorSenderCache, MultiModalReceiverCache
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.sampling_params import StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

from demo.train.recitation import DENSE
from vllm_ray_ascend.engine.recovery import _recovering_post_step, _recovering_step, abort_running_requests

BLOCK, IMAGE, RUNNING = 16, 8, 2
PROMPT = 2 * BLOCK + 3


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncScheduler]:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # vllm-ascend sets variables where it creates a config
    with create_scheduler() as created:
        yield created


@contextlib.contextmanager
def create_scheduler() -> Iterator[AsyncScheduler]:
    """Create a scheduler as a multimodal model has it: with an encoder cache, here of four images."""
    config = EngineArgs(
        model=str(DENSE),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=RUNNING,
        max_num_batched_tokens=256,
        block_size=BLOCK,
        enable_prefix_caching=True,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 64
    init_none_hash(sha256)
    cache = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    with set_current_vllm_config(config):
        created = AsyncScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], cache)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        created.encoder_cache_manager = EncoderCacheManager(4 * IMAGE)
        created.max_num_encoder_input_tokens = 4 * IMAGE
        yield created


def request(name: str, image: str = "", **options: Any) -> Request:
    """Create a request, whose prompt has ``image`` in it."""
    feature = MultiModalFeatureSpec(None, "image", image, PlaceholderRange(offset=4, length=IMAGE))
    parameters = SamplingParams(max_tokens=4, ignore_eos=True)
    return Request(
        name,
        list(range(1, PROMPT + 1)),
        parameters,
        None,
        mm_features=[feature] if image else None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
        **options,
    )


def engine_of(scheduler: AsyncScheduler) -> Any:
    return SimpleNamespace(scheduler=scheduler, batch_queue=deque([object()]))


def failed_requests(outputs: Any) -> set[str]:
    found = [output for each in outputs.values() for output in each.outputs]
    assert {output.finish_reason for output in found} <= {FinishReason.ERROR}
    return {output.request_id for output in found}


def answer(scheduler: AsyncScheduler, batch: Any) -> None:
    """Take a token for each request of a batch."""
    names = list(batch.num_scheduled_tokens)
    output = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[7]] * len(names),
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )
    scheduler.update_from_output(batch, output)


def test_new_workers_encode_the_images_that_old_ones_had(scheduler: AsyncScheduler) -> None:
    """Of a waiting request and of a new one: else each would end with "Encoder cache miss", the next engine too."""
    for name in ("first", "second", "waiting"):
        scheduler.add_request(request(name, "cat"))
    assert scheduler.schedule().scheduled_encoder_inputs == {"first": [0]}  # the second one shares it
    engine = engine_of(scheduler)
    assert failed_requests(abort_running_requests(engine)) == {"first", "second"}
    assert not engine.batch_queue and list(scheduler.requests) == ["waiting"]
    scheduler.add_request(request("new", "cat"))
    batch = scheduler.schedule()
    assert batch.num_scheduled_tokens["waiting"] == PROMPT  # no cached block of the prompt either
    assert batch.scheduled_encoder_inputs == {"waiting": [0]}
    answer(scheduler, batch)


def test_inputs_that_the_server_does_not_send_again_are_kept(scheduler: AsyncScheduler) -> None:
    """vLLM's two ends of the "lru" cache: an image is sent once, and the engine core has it for new workers."""
    config: Any = SimpleNamespace(get_multimodal_config=lambda: SimpleNamespace(mm_processor_cache_gb=1))
    server, engine = MultiModalProcessorSenderCache(config), engine_of(scheduler)
    engine.mm_receiver_cache = MultiModalReceiverCache(config)
    pixels = MultiModalKwargsItem({"pixels": MultiModalFieldElem(torch.ones(3), MultiModalBatchedField())})

    def send(name: str) -> Request:
        sent, _ = server.get_and_update_item((pixels, []), "cat")
        arrived = request(name, "cat")
        arrived.mm_features[0].data = sent
        engine.mm_receiver_cache.get_and_update_features(arrived.mm_features)
        scheduler.add_request(arrived)
        return arrived

    running = send("running")
    scheduler.schedule()
    assert failed_requests(abort_running_requests(engine)) == {"running"}
    assert server.is_cached_item("cat"), "the server takes it for sent"
    new = send("new")
    assert running.mm_features[0].data is new.mm_features[0].data is pixels
    assert scheduler.schedule().scheduled_encoder_inputs == {"new": [0]}


def structured_request(scheduler: AsyncScheduler, name: str) -> Request:
    """Create a request whose answer is "yes" or "no", and wait for its grammar."""
    created = request(name)
    created.sampling_params.structured_outputs = constraint = StructuredOutputsParams(regex="yes|no")
    constraint._backend = "xgrammar"
    created.structured_output_request = StructuredOutputRequest(params=constraint)
    scheduler.structured_output_manager.grammar_init(created)
    created.structured_output_request._grammar.result(60)
    return created


def test_a_waiting_request_keeps_its_grammar(scheduler: AsyncScheduler) -> None:
    """It belongs to the engine core's process, and its client does not send it again."""
    for name in ("first", "second", "waiting"):
        scheduler.add_request(structured_request(scheduler, name))
    begun = scheduler.get_grammar_bitmask(scheduler.schedule())
    assert begun.structured_output_request_ids == ["first", "second"]
    allowed = begun.grammar_bitmask[0].copy()
    assert failed_requests(abort_running_requests(engine_of(scheduler))) == {"first", "second"}
    grammar = scheduler.get_grammar_bitmask(scheduler.schedule())
    assert grammar.structured_output_request_ids == ["waiting"]
    assert (grammar.grammar_bitmask == allowed).all(), "the tokens that may begin an answer"


def test_encoder_cache_has_its_whole_room_again(scheduler: AsyncScheduler) -> None:
    for name in ("first", "second"):
        scheduler.add_request(request(name, name))
    scheduler.schedule()
    abort_running_requests(engine_of(scheduler))
    manager = scheduler.encoder_cache_manager
    assert (manager.num_free_slots, manager.num_freeable_slots) == (4 * IMAGE, 4 * IMAGE)
    assert manager.cached == {} and manager.get_freed_mm_hashes() == []


def test_new_workers_are_not_sent_requests_that_they_never_had(scheduler: AsyncScheduler) -> None:
    scheduler.add_request(request("running"))
    scheduler.schedule()
    abort_running_requests(engine_of(scheduler))
    assert not scheduler.has_requests()
    scheduler.add_request(request("new"))
    assert scheduler.schedule().finished_req_ids == set()


@pytest.mark.parametrize("next_input", [False, True])
def test_sessions_end_whose_earlier_inputs_were_computed(scheduler: AsyncScheduler, next_input: bool) -> None:
    """A session that waits for its client, or whose next input waits to be scheduled, has its blocks on the NPUs."""
    session = request("session", resumable=True)
    session.max_tokens = 1
    scheduler.add_request(session)
    answer(scheduler, scheduler.schedule())
    if next_input:
        scheduler.add_request(request("session", resumable=True))
    assert session.num_computed_tokens
    scheduler.add_request(request("waiting"))
    assert failed_requests(abort_running_requests(engine_of(scheduler))) == {"session"}
    assert scheduler.num_waiting_for_streaming_input == 0
    assert scheduler.schedule().num_scheduled_tokens == {"waiting": PROMPT}


class Executor:
    """An executor whose workers have died."""

    cause: object = "rank 0 died"

    def can_restart(self, limit_s: float = 0.0) -> bool:
        return self.cause is not None

    def restart(self) -> None:
        self.cause = None


def test_a_failure_between_steps_is_answered_by_the_next_step(scheduler: AsyncScheduler) -> None:
    """post_step asks workers for draft tokens; an engine core in the caller's process has no queue for outputs."""

    def fail(*_: Any) -> None:
        raise RuntimeError("a worker died")

    scheduler.add_request(request("running"))
    scheduler.schedule()
    engine = engine_of(scheduler)
    engine.model_executor = Executor()
    _recovering_post_step(fail)(engine, True)
    step = _recovering_step(lambda _: ({}, True))
    outputs, executed = step(engine)
    assert failed_requests(outputs) == {"running"} and not executed
    assert step(engine) == ({}, True)
    with pytest.raises(RuntimeError, match="a worker died"):
        _recovering_post_step(fail)(engine, True)  # no worker has failed since
