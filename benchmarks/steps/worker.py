"""A worker that answers at once: what is left of a step is its executor."""

from __future__ import annotations

from typing import Any

from vllm.v1.outputs import ModelRunnerOutput
from vllm_ascend.worker.worker import NPUWorker

from benchmarks.steps.usage import Usage, pin_to_core, used_so_far


class AnsweringWorker(NPUWorker):  # type: ignore[misc]  # untyped
    """Opens its NPU and joins its groups as any worker; has no model, and answers each request with one token."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load nothing."""

    def execute_model(self, scheduler_output: Any) -> None:
        """Prepare the answer, which vLLM asks for with `sample_tokens`."""
        names = list(scheduler_output.num_scheduled_tokens)
        indices = {name: index for index, name in enumerate(names)}
        self._answer = ModelRunnerOutput(names, indices, [[index] for index in range(len(names))])

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        """Return one token for each request of the last `execute_model`."""
        return self._answer

    def bench_pin(self) -> None:
        """Run on one core, each rank on the next; the engine is on the first."""
        pin_to_core(self.rank + 1)

    def bench_usage(self) -> Usage:
        """Return what this worker's process has used so far."""
        return used_so_far()
