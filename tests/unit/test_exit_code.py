"""What is recorded of an engine before it is shut down, for the exit code of its server."""

from __future__ import annotations

import pytest

from vllm_ray_ascend.engine.exit_code import _HAS_FAILED, _record_failure

pytestmark = pytest.mark.unit


class Engine:
    """As vLLM's AsyncLLM: `errored` asks the engine core, and after the shutdown every engine is dead."""

    def __init__(self, is_dead: bool | None) -> None:
        if is_dead is not None:
            self.engine_core = {"dead": is_dead}

    @property
    def errored(self) -> bool:
        return self.engine_core["dead"]

    @_record_failure
    def shutdown(self) -> None:
        if hasattr(self, "engine_core"):
            self.engine_core["dead"] = True


@pytest.mark.parametrize("is_dead", [True, False])
def test_the_state_before_the_first_shutdown_counts(is_dead: bool) -> None:
    engine = Engine(is_dead)
    engine.shutdown()
    engine.shutdown()
    assert engine.errored
    assert getattr(engine, _HAS_FAILED) is is_dead


def test_an_engine_whose_start_failed_is_shut_down_without_another_error() -> None:
    engine = Engine(None)
    engine.shutdown()
    assert not hasattr(engine, _HAS_FAILED)
