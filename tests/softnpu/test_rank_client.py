"""vLLM's own client of data parallel ranks, one of which is lost, with sockets in the place of engine cores."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm import PoolingParams, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType, FinishReason, UtilityOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.executor.abstract import Executor
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from demo.train.recitation import DENSE
from vllm_ray_ascend.engine import rank_client
from vllm_ray_ascend.engine.rank_status import (
    RANK_DOWN,
    RANK_UP,
    SIZE_CHANGED,
    RankStatus,
    SizeStatus,
    StatusPublisher,
    error_output,
)
from vllm_ray_ascend.errors import RankDownError

LIMIT_S = 60.0
_POLL_MS = 10


class EngineCore:
    """The sockets of one rank's engine core. It answers calls, unless it is ``silent``, and keeps requests."""

    def __init__(self, rank: int, addresses: dict[str, str], silent: bool = False) -> None:
        self.requests: list[str] = []
        self.calls: list[str] = []
        self.is_paused = False
        self._silent = silent
        self._killed = threading.Event()
        self._context = zmq.Context()
        self._input = self._context.socket(zmq.DEALER)
        self._input.setsockopt(zmq.IDENTITY, rank.to_bytes(2, "little"))
        self._input.connect(addresses["input_address"])
        self._output = self._context.socket(zmq.PUSH)
        self._output.connect(addresses["output_address"])
        self._input.send(b"")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        self._killed.set()
        self._thread.join(LIMIT_S)
        self._context.destroy(0)

    def _serve(self) -> None:
        decode_request, decode_call = MsgpackDecoder(EngineCoreRequest), MsgpackDecoder()
        while not self._killed.is_set():
            if not self._input.poll(_POLL_MS):
                continue
            kind, *frames = self._input.recv_multipart()
            if kind == EngineCoreRequestType.ADD.value:
                self.requests.append(decode_request.decode(frames).request_id)
            elif kind == EngineCoreRequestType.UTILITY.value:
                _, call_id, method, _ = decode_call.decode(frames)
                self.calls.append(method)
                if not self._silent:
                    answer = self.is_paused and method == "is_scheduler_paused"
                    output = UtilityOutput(call_id=call_id, result=UtilityResult(answer))
                    self._output.send_multipart(MsgpackEncoder().encode(EngineCoreOutputs(utility_output=output)))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # vllm-ascend sets variables where it creates a config
    rank_client.install()
    rank_client.report_health()


@asynccontextmanager
async def two_ranks(silent: bool = False) -> AsyncIterator[tuple[Any, list[EngineCore], dict[str, str]]]:
    """Yield a client, its two engine cores, and its addresses."""
    config = EngineArgs(model=str(DENSE), dtype="float32", max_model_len=256).create_engine_config()
    ranks = config.parallel_config
    ranks.data_parallel_size, ranks.data_parallel_size_local, ranks.data_parallel_rank_local = 2, 2, None
    ours, theirs = multiprocessing.Pipe()
    context = zmq.Context()
    coordinator = context.socket(zmq.XPUB)
    coordinator.bind("tcp://127.0.0.1:0")
    addresses: dict[str, str] = {}
    cores: list[EngineCore] = []

    def connect() -> None:
        addresses.update(ours.recv())
        cores.extend(EngineCore(rank, addresses, silent) for rank in (0, 1))

    thread = threading.Thread(target=connect)
    thread.start()
    given = {
        "input_address": "tcp://127.0.0.1:0",
        "output_address": "tcp://127.0.0.1:0",
        "stats_update_address": coordinator.getsockopt_string(zmq.LAST_ENDPOINT),
        "actual_address_pipe": theirs,
    }
    client = DPLBAsyncMPClient(config, Executor, log_stats=False, client_addresses=given)
    thread.join(LIMIT_S)
    publisher = StatusPublisher(SimpleNamespace(outputs=[addresses["output_address"]]))
    client.publish = publisher.publish
    try:
        yield client, cores, addresses
    finally:
        publisher.close()
        client.shutdown()
        for core in cores:
            core.kill()
        context.destroy(0)


def request(name: str, rank: int | None = None) -> EngineCoreRequest:
    return EngineCoreRequest(name, [1, 2], None, SamplingParams(), None, 0.0, None, None, rank)


async def until(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def next_failures(client: Any) -> list[str]:
    """Return the requests that fail next."""
    outputs = (await asyncio.wait_for(client.get_output_async(), LIMIT_S)).outputs
    assert {output.finish_reason for output in outputs} == {FinishReason.ERROR}
    return sorted(output.request_id for output in outputs)


async def lose(client: Any, core: EngineCore, rank: int = 1) -> None:
    core.kill()
    client.publish(RANK_DOWN, RankStatus(rank, "it was killed", requests_lost=True))
    await until(lambda: rank_client._states[client].down)


def test_requests_of_a_lost_rank_fail_and_others_go_to_the_rank_that_serves() -> None:
    async def scenario() -> None:
        async with two_ranks() as (client, cores, _):
            for name, rank in (("a", 0), ("b", 1), ("c", 1)):
                await client.add_request_async(request(name, rank))
            await until(lambda: cores[1].requests == ["b", "c"])
            await lose(client, cores[1])
            assert await next_failures(client) == ["b", "c"]
            for number in range(4):
                await client.add_request_async(request(f"d{number}"))
            await until(lambda: cores[0].requests == ["a", "d0", "d1", "d2", "d3"])
            await client.add_request_async(request("e", 1))
            assert await next_failures(client) == ["e"]
            assert set(client.reqs_in_flight) == {"a", "d0", "d1", "d2", "d3"}
            assert rank_client._requests_in_flight(client)[client.core_engines[1]] == 0

    asyncio.run(scenario())


def test_calls_of_a_lost_rank_fail_and_later_ones_leave_it_out_or_are_refused() -> None:
    async def scenario() -> None:
        async with two_ranks(silent=True) as (client, cores, _):
            waiting = asyncio.ensure_future(client.call_utility_async("reset_prefix_cache"))
            await until(lambda: cores[1].calls)
            await lose(client, cores[1])
            with pytest.raises(RankDownError, match="data parallel rank 1 is down: it was killed"):
                await asyncio.wait_for(waiting, LIMIT_S)
            with pytest.raises(RankDownError, match="sleep was called on no rank"):
                await client.call_utility_async("sleep", 1)
            with pytest.raises(RankDownError, match="collective_rpc was called on no rank"):
                await client.call_utility_async("collective_rpc", "update_weights", None, (), None)
            waiting = asyncio.ensure_future(client.call_utility_async("collective_rpc", "list_loras", None, (), None))
            await until(lambda: cores[0].calls[-1] == "collective_rpc")
            waiting.cancel()

    asyncio.run(scenario())


def test_a_new_engine_core_of_the_rank_serves_once_it_answers() -> None:
    async def scenario() -> None:
        async with two_ranks() as (client, cores, addresses):
            await lose(client, cores[1])
            client.publish(RANK_UP, RankStatus(1, is_new=True))
            await asyncio.sleep(0.5)
            assert rank_client._states[client].down  # nobody is there yet
            cores[1] = EngineCore(1, addresses)
            await until(lambda: not rank_client._states[client].down)
            await client.add_request_async(request("a", 1))
            await until(lambda: cores[1].requests == ["a"])
            await client.call_utility_async("sleep", 1)
            assert cores[1].calls[-1] == "sleep"

    asyncio.run(scenario())


def test_a_rank_that_is_gone_for_good_is_forgotten() -> None:
    """With elastic expert parallelism the others continue without it."""

    async def scenario() -> None:
        async with two_ranks() as (client, cores, _):
            await lose(client, cores[1])
            assert rank_client.describe_ranks_down(client)
            client.publish(SIZE_CHANGED, SizeStatus(ranks=1, local_ranks=1, redundant_experts=0))
            await until(lambda: len(client.core_engines) == 1)
            assert not rank_client.describe_ranks_down(client)
            assert client.vllm_config.parallel_config.data_parallel_size == 1
            await client.add_request_async(request("a", 0))
            await until(lambda: cores[0].requests == ["a"])

    asyncio.run(scenario())


def test_a_new_engine_core_is_paused_as_the_others_are() -> None:
    """As while the weights of all ranks are updated."""

    async def scenario() -> None:
        async with two_ranks() as (client, cores, addresses):
            cores[0].is_paused = True
            await lose(client, cores[1])
            client.publish(RANK_UP, RankStatus(1, is_new=True))
            cores[1] = EngineCore(1, addresses)
            await until(lambda: not rank_client._states[client].down)
            assert cores[1].calls[-1] == "pause_scheduler"

    asyncio.run(scenario())


def test_a_rank_that_is_lost_again_before_it_answers_stays_down() -> None:
    async def scenario() -> None:
        async with two_ranks() as (client, cores, addresses):
            await lose(client, cores[1])
            client.publish(RANK_UP, RankStatus(1, is_new=True))
            client.publish(RANK_DOWN, RankStatus(1, "it was killed again", requests_lost=True))
            await until(lambda: "again" in rank_client._states[client].describe())
            cores[1] = EngineCore(1, addresses)
            await asyncio.sleep(3 * rank_client._RETRY_S)
            assert rank_client._states[client].down

    asyncio.run(scenario())


def test_what_a_lost_engine_core_has_sent_before_does_not_bring_its_rank_back() -> None:
    async def scenario() -> None:
        async with two_ranks() as (client, cores, _):
            await lose(client, cores[1])
            await rank_client.mark_up(client, RankStatus(1, "its workers were restarted"))
            assert client.core_engines[1] in rank_client._states[client].down

    asyncio.run(scenario())


def test_a_call_whose_rank_was_chosen_before_it_was_lost_fails() -> None:
    async def scenario() -> None:
        async with two_ranks() as (client, cores, _):
            await lose(client, cores[1])
            call = client._call_utility_async("reset_prefix_cache", engine=client.core_engines[1])
            with pytest.raises(RankDownError, match="data parallel rank 1 is down"):
                await asyncio.wait_for(call, LIMIT_S)

    asyncio.run(scenario())


@pytest.mark.skipif(not hasattr(DPLBAsyncMPClient, "call_utility_all_async"), reason="vLLM 0.32 and later have it")
def test_a_call_for_the_answers_of_all_ranks_leaves_out_a_lost_one_or_is_refused() -> None:
    async def scenario() -> None:
        async with two_ranks() as (client, cores, _):
            await lose(client, cores[1])
            assert await client.call_utility_all_async("reset_prefix_cache") == [False]
            with pytest.raises(RankDownError, match="wake_up was called on no rank"):
                await client.call_utility_all_async("wake_up", None)

    asyncio.run(scenario())


class OldClient:
    """The state of a client of vLLM 0.23 to 0.26, whose load balancer counts waiting and running requests only."""

    def __init__(self) -> None:
        self.client_index = 1
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(), model_config=SimpleNamespace(runner_type="generate")
        )
        self.reqs_in_flight = {"a": b"\0\0", "b": b"\1\0"}
        self.lb_engines = [[0, 1], [0, 1]]
        self.outputs_queue: asyncio.Queue[Any] = asyncio.Queue()


def test_clients_of_older_releases_lose_a_rank_too() -> None:
    async def scenario() -> None:
        client = OldClient()
        states = rank_client._states[client] = rank_client.RankStates()
        rank_client.mark_down(client, RankStatus(1, "it was killed", requests_lost=True))
        assert client.outputs_queue.get_nowait().finished_requests == {"b"} and set(client.reqs_in_flight) == {"a"}
        states.lost.clear()
        await rank_client.mark_up(client, RankStatus(1))
        assert client.lb_engines == [[0, 1], [0, 0]]

    asyncio.run(scenario())


async def outputs_of(generate: Any) -> list[Any]:
    return [output async for output in generate(SimpleNamespace(engine_core=OldClient()))]


def test_a_pooling_request_that_fails_ends_with_an_error_and_the_server_does_not() -> None:
    processor, queue = OutputProcessor(None, log_stats=False), RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "a")
    pooling = EngineCoreRequest("a", [1, 2], None, None, PoolingParams(task="embed"), 0.0, None, None, None)
    pooling.external_req_id = "a"
    processor.add_request(pooling, None, queue=queue)
    processor.process_outputs([error_output("a", is_pooling=True)], 0.0, None)
    assert not processor.request_states

    async def encode(_: Any) -> AsyncGenerator[Any, None]:
        yield await queue.get()

    with pytest.raises(Exception, match="the workers failed") as raised:
        asyncio.run(outputs_of(rank_client._raising_pooling_error(encode)))
    assert type(raised.value).__name__ == "GenerationError"


def test_a_choice_that_fails_before_its_first_token_is_an_error_though_another_has_begun() -> None:
    async def generate(_: Any) -> AsyncGenerator[Any, None]:
        for index, token_ids, reason in ((0, [1], None), (1, [], "error")):
            yield SimpleNamespace(outputs=[SimpleNamespace(index=index, token_ids=token_ids, finish_reason=reason)])

    with pytest.raises(Exception, match="the workers failed"):
        asyncio.run(outputs_of(rank_client._raising_first_error(generate)))


def test_health_names_what_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with two_ranks() as (client, cores, _):
            engine = SimpleNamespace(engine_core=client, errored=False)
            await AsyncLLM.check_health(engine)
            await lose(client, cores[1])
            await AsyncLLM.check_health(engine)
            monkeypatch.setenv("VLLM_RAY_ASCEND_DEGRADED_HEALTH", "503")
            with pytest.raises(EngineDeadError, match="data parallel rank 1 is down: it was killed"):
                await AsyncLLM.check_health(engine)
            monkeypatch.delenv("VLLM_RAY_ASCEND_DEGRADED_HEALTH")
            client.publish(RANK_DOWN, RankStatus(0, "killed too", requests_lost=True))
            await until(lambda: len(rank_client._states[client].down) == 2)
            with pytest.raises(EngineDeadError):
                await AsyncLLM.check_health(engine)

    asyncio.run(scenario())
