"""An engine under test, and how it is asked: everything that the checks share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.train.recitation import line_prompts, zen_after

TOLERANCE = 1e-3
"""Of log-probabilities in fp32: between right programs they agree to 0.0001 (demo/models/README.md)."""
ALL_TOKENS = 320
CHUNK = 64
"""Most tokens in a batch: longer prompts are prefilled in chunks."""
SIZES = [1, 2]


class WrongError(AssertionError):
    """The engine did not do what it should; the message says what it did."""


def check_equal(got: object, wanted: object, what: str) -> None:
    """Raise WrongError unless both are equal. A plain assert says little outside pytest."""
    if got != wanted:
        raise WrongError(f"{what}: {got!r} instead of {wanted!r}")


def check_true(truth: object, what: str) -> None:
    """Raise WrongError unless it is true."""
    if not truth:
        raise WrongError(what)


class Engine:
    """vLLM's AsyncLLM on Ray, with what its answers have to be."""

    def __init__(self, llm: Any, options: dict[str, Any]) -> None:
        from demo.train.reference import stored_reference

        self.llm = llm
        self.options = options
        self.entries = [dict(entry) for entry in stored_reference(Path(options["model"]), "float32")]
        self.changed = json.loads((Path(options["folder"]) / "changed.json").read_text())
        self.remarks: dict[str, str] = {}
        """What a check saw, for whoever reads the log."""
        self._numbers = itertools.count()

    async def ask(self, prompt: str | Sequence[int], name: str = "", lora: Any = None, **parameters: Any) -> Any:
        """Return the finished output, greedy unless ``parameters`` change that."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        given = {"temperature": 0, "max_tokens": ALL_TOKENS, "output_kind": RequestOutputKind.FINAL_ONLY, **parameters}
        text = prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
        request = name or f"request-{next(self._numbers)}"
        async for output in self.llm.generate(text, SamplingParams(**given), request, lora_request=lora):
            last = output
        return last

    async def check_entry(self, entry: dict[str, Any], lora: Any = None) -> None:
        """Tokens and log-probabilities after the entry's prompt are the entry's."""
        probe = entry["kind"] == "probe"
        answer = await self.ask(
            entry["prompt_tokens"], lora=lora, max_tokens=len(entry["tokens"]), logprobs=1, ignore_eos=probe
        )
        result = answer.outputs[0]
        check_equal(list(result.token_ids), entry["tokens"], f"tokens after {entry['prompt']!r}")
        got = [chosen[token].logprob for token, chosen in zip(result.token_ids, result.logprobs, strict=True)]
        worst = max(abs(a - b) for a, b in zip(got, entry["logprobs"], strict=True))
        check_true(worst < TOLERANCE, f"a log-probability after {entry['prompt']!r} is off by {worst}")

    async def check_entries(self, entries: Sequence[dict[str, Any]], lora: Any = None) -> None:
        for entry in entries:
            await self.check_entry(entry, lora)

    async def check_text(self, prompt: str = "") -> None:
        """Check that the engine generates the trained text."""
        prompt = prompt or line_prompts()[-1]
        answer = await self.ask(prompt)
        check_equal(answer.outputs[0].text, zen_after(prompt), f"text after {prompt!r}")

    def probes(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] == "probe"]

    async def workers(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the result of every worker."""
        answers: list[Any] = await self.llm.collective_rpc(method, args=args, kwargs=kwargs)
        return answers


def start(options: dict[str, Any]) -> Engine:
    """Start the engine of ``options`` with metrics in Ray."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    given = options.get("arguments", {})
    drafts = given.get("speculative_config", {}).get("num_speculative_tokens", 0)
    sizes = [(drafts + 1) * requests for requests in SIZES]  # a step has a token of each request, and its drafts
    arguments = AsyncEngineArgs(
        model=options["model"],
        dtype="float32",
        tensor_parallel_size=options["tp"],
        pipeline_parallel_size=options["pp"],
        distributed_executor_backend=options.get("backend", "ray"),
        compilation_config={"cudagraph_capture_sizes": sizes},
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=64 << 20,
        worker_extension_cls="tests.e2e.parity.worker.ParityWorker",
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},  # it would write blanks only
        additional_config={"weight_nz_mode": 0},  # vllm-ascend refuses to wake up otherwise
        seed=0,
        **given,
    )
    return Engine(AsyncLLM.from_engine_args(arguments, stat_loggers=[RayPrometheusStatLogger]), options)
