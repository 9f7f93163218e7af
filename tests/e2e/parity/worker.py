"""The worker extension class of the parity tests: records the batches of each worker, and changes its weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.facts import WorkerFacts


def recording_end(batch: dict[str, Any], get_output: Callable[[], Any]) -> Callable[[], Any]:
    """Return ``get_output`` of a batch, which then records the batch's end."""

    def get() -> Any:
        output = get_output()
        batch["end"] = time.monotonic_ns()
        return output

    return get


class ParityWorker(WorkerFacts):
    """Mixed into vllm-ascend's worker by `worker_extension_cls`, as trainers do for reinforcement learning."""

    def watch_batches(self) -> None:
        """Record each batch from now on: begin and end on this machine's clock, and the tokens of each request."""
        runner = self.model_runner  # type: ignore[attr-defined]
        self.batches: list[dict[str, Any]] = []
        execute, sample = runner.execute_model, runner.sample_tokens

        def recording_execute(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            batch = {"begin": time.monotonic_ns(), "tokens": dict(scheduled.num_scheduled_tokens)}
            if batch["tokens"]:
                self.batches.append(batch)
            result = execute(scheduled, *args, **kwargs)
            batch["end"] = time.monotonic_ns()
            return result

        def recording_sample(*args: Any, **kwargs: Any) -> Any:
            result = sample(*args, **kwargs)
            if self.batches:
                batch = self.batches[-1]
                batch |= {"end": time.monotonic_ns(), "output": type(result).__name__}
                if hasattr(result, "get_output"):  # the NPU still computes; another thread waits for it
                    result.get_output = recording_end(batch, result.get_output)
            return result

        runner.execute_model, runner.sample_tokens = recording_execute, recording_sample

    def take_batches(self) -> list[dict[str, Any]]:
        """Return the batches since the last call."""
        batches, self.batches = self.batches, []
        return batches

    def describe(self, names: list[str], places: bool = True) -> dict[str, Any]:
        """Return variables of this process, options of the scheduler, and the memory in use on the NPU."""
        import torch

        free, total = torch.npu.mem_get_info()
        scheduler = self.vllm_config.scheduler_config  # type: ignore[attr-defined]
        return {
            "rank": self.rank if places else None,  # type: ignore[attr-defined]
            "environment": {name: os.environ.get(name) for name in names},
            "async_scheduling": scheduler.async_scheduling,
            "chunked_prefill": scheduler.enable_chunked_prefill,
            "used": total - free,
        }

    def load_scaled(self, factors: dict[str, float], everything: bool = False) -> int:
        """Load the model's own weights in place, those in ``factors`` multiplied; return how many."""
        from safetensors.torch import load_file

        stored = load_file(Path(self.vllm_config.model_config.model) / "model.safetensors")  # type: ignore[attr-defined]
        wanted = stored if everything else {name: stored[name] for name in factors}
        scaled = [(name, weight.float() * factors.get(name, 1.0)) for name, weight in wanted.items()]
        return len(self.model_runner.model.load_weights(iter(scaled)))  # type: ignore[attr-defined]

    def fail_on(self, rank: int, text: str) -> int:
        """Raise on one rank."""
        if self.rank == rank:  # type: ignore[attr-defined]
            raise ValueError(text)
        return rank
