"""A cluster that grows: try again until it can be, or say why not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from vllm_ray_ascend.errors import ClusterResourceError, ShortageError
from vllm_ray_ascend.log import get_logger

_POLL_S = 0.5
_Result = TypeVar("_Result")

logger = get_logger(__name__)


def until(attempt: Callable[[], _Result], wait_s: float) -> _Result:
    """What ``attempt`` returns, once it raises neither ClusterResourceError nor ShortageError any more.

    After ``wait_s`` seconds its last error is raised.
    """
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        try:
            return attempt()
        except (ClusterResourceError, ShortageError) as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                logger.info("waiting up to %g s for the cluster: %s", wait_s, error)
            told = True
        time.sleep(_POLL_S)
