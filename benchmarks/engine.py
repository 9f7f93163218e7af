"""What the benchmark does with vLLM inside an engine's process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from demo.train.recitation import DENSE

_PROMPT_TOKENS = 32
_VOCABULARY = 256
"""The least tokens of the demonstration model that are all letters."""


class Marks(dict[str, float]):
    """Points in time on the clock of time.monotonic(), by name."""

    def mark(self, name: str) -> None:
        """Record the current time as ``name``."""
        self[name] = time.monotonic()


def make_config(backend: str, tp: int, pp: int, graphs: bool, *, headless: bool = False, **changes: Any) -> Any:
    """Return vLLM's configuration of the demonstration model, the same for every executor but for ``changes``.

    ``headless``: for the part of an engine that another node has.
    """
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {
        "model": str(DENSE),
        "dtype": "float32",
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "distributed_executor_backend": backend,
        "enforce_eager": not graphs,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 16 << 20,
        "enable_prefix_caching": False,
        "worker_cls": "benchmarks.worker.TimedWorker",
        "disable_log_stats": True,
        "seed": 0,
    }
    return EngineArgs(**{**arguments, **changes}).create_engine_config(headless=headless)


def timed_executor(config: Any, marks: Marks) -> type[Any]:
    """Return the executor class that ``config`` selects, which records its points of a start."""
    from vllm.v1.executor import Executor

    base: Any = Executor.get_class(config)

    class Timed(base):  # type: ignore[misc]
        def __init__(self, vllm_config: Any) -> None:
            marks.mark("executor begins")
            super().__init__(vllm_config)
            marks.mark("executor ends")

        def initialize_from_config(self, configs: Any) -> Any:
            result = super().initialize_from_config(configs)
            marks.mark("kv cache")
            return result

        def compile_or_warm_up_model(self) -> Any:
            result = super().compile_or_warm_up_model()
            marks.mark("warm-up")
            return result

    Timed.__name__, Timed.__qualname__ = base.__name__, base.__qualname__
    return Timed


class Engine:
    """vLLM's engine in this very process: its executor is at hand, and no other process dilutes what that costs."""

    def __init__(self, config: Any, executor_class: type[Any]) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine(config, executor_class, log_stats=False, multiprocess_mode=False)
        self._requests = 0

    @property
    def executor(self) -> Any:
        """The executor."""
        return self._engine.model_executor

    def generate(self, requests: int, tokens: int) -> dict[str, Any]:
        """Run ``requests`` simultaneously, ``tokens`` each.

        Seconds to the first token and per further token of each request, and the tokens.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        added: dict[str, float] = {}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        chosen: dict[str, list[int]] = {}
        for number in range(requests):
            name = str(self._requests + number)
            prompt = [1 + (number + position) % _VOCABULARY for position in range(_PROMPT_TOKENS)]
            added[name] = time.monotonic()
            self._engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        self._requests += requests
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.monotonic()
            for output in outputs:
                if new := output.outputs[0].token_ids:
                    key = output.request_id.partition("-")[0]
                    first.setdefault(key, now)
                    last[key] = now
                    chosen.setdefault(key, []).extend(new)
        return {
            "first": [first[name] - added[name] for name in added],
            "token": [(last[name] - first[name]) / (tokens - 1) for name in added],
            "tokens": [chosen[name] for name in added],
        }


def call(executor: Any, count: int) -> list[float]:
    """Return seconds of each of ``count`` empty calls to all workers."""
    seconds = []
    for _ in range(count):
        before = time.monotonic()
        executor.collective_rpc("bench_nothing")
        seconds.append(time.monotonic() - before)
    return seconds


def started(executor: Any) -> tuple[list[int], list[Mapping[str, float]]]:
    """Return process numbers and marks of the workers, by rank."""
    answers = executor.collective_rpc("bench_started")
    return [pid for pid, _ in answers], [marks for _, marks in answers]
