"""The exit code of a server whose engine failed: vLLM's is 0, which systemd, Kubernetes and RayJob take for success."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from types import ModuleType
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.compat.import_hook import when_imported
from vllm_ray_ascend.log import get_logger

FAILED = 1
"""Exit code of a server over Ray whose engine failed."""
_HAS_FAILED = "_vllm_ray_ascend_has_failed"
_WAS_STOPPED = "_vllm_ray_ascend_was_stopped"

logger = get_logger(__name__)


def exit_nonzero_after_failure(module: ModuleType) -> None:
    """Let vLLM's server, whose ``module`` calls `serve_http`, exit with FAILED where its engine has failed."""
    if not hasattr(module, "serve_http"):  # 0.29 and later leave a module there that only imports
        return
    patches.wrap(f"{module.__name__}.serve_http", _serve_then_exit, module)
    when_imported("vllm.v1.engine.async_llm", _patch_shutdown)


def exit_nonzero_unless_stopped(module: ModuleType) -> None:
    """Let vLLM's supervisor of data parallel servers, of ``module``, exit with FAILED where no signal has ended it.

    It ends all of its servers once one has ended, whose own exit code vLLM does not look at.
    """
    patches.wrap(f"{module.__name__}.DPSupervisor._handle_signal", _record_stop)
    patches.wrap(f"{module.__name__}.DPSupervisor.run", _supervise_then_exit)


def _patch_shutdown(_: ModuleType) -> None:
    patches.wrap("vllm.v1.engine.async_llm.AsyncLLM.shutdown", _record_failure)


def _record_failure(shutdown: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(shutdown)
    def shut_down(self: Any, *args: Any, **kwargs: Any) -> None:
        """Shut the engine down; before, record whether it has failed: afterwards every engine is dead.

        One whose start has failed has no engine core, and `errored` cannot be asked: the start's error ends the server.
        """
        if hasattr(self, "engine_core") and not hasattr(self, _HAS_FAILED):
            setattr(self, _HAS_FAILED, bool(self.errored))
        shutdown(self, *args, **kwargs)

    return shut_down


def _serve_then_exit(serve_http: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(serve_http)
    async def serve(app: Any, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, None]:
        """Return vLLM's end of the server, which is awaited once the engine was shut down, and then ours."""
        engine = app.state.engine_client  # vLLM deletes the state when the application ends
        return _finish(await serve_http(app, *args, **kwargs), engine)

    return serve


async def _finish(end: Any, engine: Any) -> None:
    await end
    if engine is None or not getattr(engine, _HAS_FAILED, False):
        return
    if engine.vllm_config.parallel_config.distributed_executor_backend == "ray":
        logger.error("VRA-351: the engine of this server failed: exit code %d", FAILED)
        raise SystemExit(FAILED)


def _record_stop(handle_signal: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    @functools.wraps(handle_signal)
    def handle(self: Any, number: int) -> None:
        setattr(self, _WAS_STOPPED, True)
        handle_signal(self, number)

    return handle


def _supervise_then_exit(run: Callable[[Any], Coroutine[Any, Any, None]]) -> Callable[[Any], Coroutine[Any, Any, None]]:
    @functools.wraps(run)
    async def supervise(self: Any) -> None:
        await run(self)
        over_ray = "ray" in (self.args.distributed_executor_backend, self.args.data_parallel_backend)
        if over_ray and not getattr(self, _WAS_STOPPED, False):
            logger.error("VRA-386: a data parallel server has ended, and all others with it: exit code %d", FAILED)
            raise SystemExit(FAILED)

    return supervise
