"""Bring a worker's NPU to rest before its process ends."""

from __future__ import annotations

from typing import Any

from vllm_ray_ascend import graphs
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)


def settle(worker: Any) -> None:
    """Wait for pending pipeline sends, then for the NPU, then release graphs and leave vllm-ascend's own groups.

    A send's buffer must live until it is done, a graph until it has run, and a group until nothing uses it. vllm-ascend
    has a function that destroys its groups and calls it nowhere. What fails is logged: the process ends all the same.
    """
    for step in (_pending_sends, _synchronise, graphs.release, _ascend_groups):
        try:
            step(worker)
        except Exception as error:  # noqa: BLE001  the next step is no worse for it
            logger.warning("%s failed while the worker ended: %s", step.__name__.strip("_"), error)


def _pending_sends(worker: Any) -> None:
    for handle in getattr(worker.worker, "_pp_send_work", None) or []:
        handle.wait()


def _synchronise(_: Any) -> None:
    import torch

    torch.npu.synchronize()


def _ascend_groups(_: Any) -> None:
    from vllm_ascend.distributed.parallel_state import destroy_ascend_model_parallel

    destroy_ascend_model_parallel()
