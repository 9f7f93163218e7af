"""Calls of all workers: none gets another one's responses, and a step, which vLLM makes in two calls, is one."""

from __future__ import annotations

import functools
import pickle
import time
import uuid
from concurrent.futures import Future
from typing import Any

from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from vllm_ray_ascend.control.timeouts import MERGED_STEP
from vllm_ray_ascend.patches import is_third_party


class RpcResyncExecutor(RayExecutorV2):
    """vLLM's executor, with calls that do not read the stale responses of an earlier call that failed.

    vLLM 0.23 to 0.33 read the ranks' responses in turn and stop at the first error or at a timeout. The other ranks'
    responses stay in their queues, and every later call gets the responses to the one before: wrong results, or the
    engine ends. Calls that are not waited for are an engine's steps; no step follows one that failed.
    """

    _has_stale_responses = False

    def collective_rpc(self, method: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        """Call a method of all workers, as upstream does."""
        if self._has_stale_responses:
            self._discard_stale_responses(timeout)
        try:
            return super().collective_rpc(method, timeout, *args, **kwargs)
        except Exception:  # whatever it is, responses to this call may still arrive
            self._has_stale_responses = True
            raise

    def _discard_stale_responses(self, timeout: float | None) -> None:
        """Have every rank echo a unique token, and read its responses up to that one. Raises TimeoutError."""
        token = uuid.uuid4().hex
        deadline = None if timeout is None else time.monotonic() + timeout
        self.rpc_broadcast_mq.enqueue((pickle.dumps(_echo_token), (token,), {}, None))
        for queue in self.response_mqs:
            response: Any = None
            while not (isinstance(response, str) and response == token):
                remaining_s = None if deadline is None else max(0.0, deadline - time.monotonic())
                _, response = queue.dequeue(timeout=remaining_s)
        self._has_stale_responses = False


def _echo_token(_: Any, token: str) -> str:
    """Return ``token``. Called in a worker."""
    return token


class MergedStepExecutor(RpcResyncExecutor):
    """vLLM's executor, which calls its workers once a step where vLLM does twice.

    vLLM calls `execute_model`, and `sample_tokens` right after it: in between it computes what a grammar allows. Each
    is a message to all workers and a response. Where no request of the step has a grammar, the first call is held until
    the second one comes, and workers run both of them in one.
    """

    _held_step: Any = None
    """What an `execute_model` was given whose `sample_tokens` has not come yet."""

    @functools.cached_property
    def _merges_steps(self) -> bool:
        return samples_steps(self.vllm_config) and not has_foreign_calls(self)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Run a step, as upstream, or its first half; a Future of None where it is held until the second half."""
        if not (non_block and self._merges_steps and is_sampled_at_once(scheduler_output)):
            return super().execute_model(scheduler_output, non_block)
        if self._held_step is not None:
            self._send_held_step()
        self._held_step = scheduler_output
        return _NOTHING

    def _take_held_step(self, method: Any, kwargs: dict[str, Any]) -> Any:
        """Return the method that `collective_rpc` has to call now, in place of ``method`` with ``kwargs``.

        The second half of a step gets what is held among its arguments. Before any other call that is sent by itself.
        """
        if method != "sample_tokens" or not kwargs.get("args"):
            self._send_held_step()
            return method
        kwargs["args"] = (self._held_step, *kwargs["args"])
        self._held_step = None
        return MERGED_STEP

    def _send_held_step(self) -> None:
        held, self._held_step = self._held_step, None
        super().execute_model(held, non_block=True)


def has_foreign_calls(executor: object) -> bool:
    """Return whether somebody else's code, above or below ours, sees the calls of a step: it expects vLLM's two."""
    names = ("execute_model", "sample_tokens", "collective_rpc")
    places = [vars(executor), *map(vars, type(executor).__mro__)]
    return any(is_third_party(place[name]) for place in places for name in names if name in place)


def samples_steps(vllm_config: Any) -> bool:
    """Return whether vLLM's engine core calls `sample_tokens` for every step that has tokens.

    With an encoder elsewhere it depends on the engine's role in some releases of vLLM only: then the answer is no.
    """
    encodes_only = getattr(vllm_config, "is_mm_encoder_only", False)
    has_encoder_elsewhere = getattr(vllm_config, "ec_transfer_config", None) is not None
    return vllm_config.model_config.runner_type != "pooling" and not encodes_only and not has_encoder_elsewhere


def is_sampled_at_once(scheduler_output: Any) -> bool:
    """Return whether a step of vLLM has tokens, and none that a grammar is computed for."""
    return scheduler_output.total_num_scheduled_tokens > 0 and not scheduler_output.has_structured_output_requests


def completed_future(result: Any) -> Future[Any]:
    """Return a Future that has its result."""
    completed: Future[Any] = Future()
    completed.set_result(result)
    return completed


_NOTHING = completed_future(None)
