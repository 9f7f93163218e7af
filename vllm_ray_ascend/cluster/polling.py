"""A cluster that changes: retry what needs NPUs until they are there, or until the time limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from vllm_ray_ascend.errors import ClusterResourceError, ShortageError
from vllm_ray_ascend.log import get_logger

_POLL_S = 0.5
_Result = TypeVar("_Result")

logger = get_logger(__name__)


def poll_until(attempt: Callable[[], _Result], wait_s: float, announced: bool = False) -> _Result:
    """Return what ``attempt`` returns, once it no longer raises ClusterResourceError or ShortageError.

    After ``wait_s`` seconds its last error is raised. The first is logged, unless the wait is ``announced`` already.
    """
    deadline = time.monotonic() + wait_s
    logged = announced
    while True:
        try:
            return attempt()
        except (ClusterResourceError, ShortageError) as error:
            if time.monotonic() >= deadline:
                raise
            if not logged:
                logger.info("waiting up to %g s for the cluster: %s", wait_s, error)
            logged = True
        time.sleep(_POLL_S)
