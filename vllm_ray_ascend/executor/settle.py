"""Bring a worker's NPU to rest before its process ends."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)


def settle(worker: Any) -> None:
    """Wait for pending pipeline sends, then for the device, then release graphs and leave the platform's own groups.

    A send's buffer must live until it is done, a graph until it has run, and a group until nothing uses it. What fails
    is logged: the process ends all the same.
    """
    for step in (_pending_sends, _synchronise, _graphs, _platform_groups):
        try:
            step(worker)
        except Exception as error:  # noqa: BLE001  the next step is no worse for it
            logger.warning("%s failed while the worker ended: %s", step.__name__.strip("_"), error)


def _pending_sends(worker: Any) -> None:
    for handle in getattr(worker.worker, "_pp_send_work", None) or []:
        handle.wait()


def _synchronise(_: Any) -> None:
    current().synchronise()


def _graphs(worker: Any) -> None:
    current().release_graphs(getattr(worker.worker, "model_runner", None))


def _platform_groups(_: Any) -> None:
    current().leave_groups()
