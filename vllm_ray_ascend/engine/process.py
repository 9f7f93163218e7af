"""What every process of an engine does on its node first: take the node's variables, not the driver's."""

from __future__ import annotations

import atexit
import functools
import gc
import os

from vllm_ray_ascend.accelerators.choose import current
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.environment.driver import GROUPS, driver_settings, parse_driver_settings
from vllm_ray_ascend.environment.node import prepare
from vllm_ray_ascend.environment.table import DRIVER_VARIABLE, NEVER_COPIED, of_the_node, on_request
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)

ENGINE_LIFELINE = "_VLLM_RAY_ASCEND_ENGINE_LIFELINE"
"""Where an engine core that is a Ray actor finds its driver."""


@functools.cache
def end_without_collecting() -> None:
    """Skip the interpreter's last search for cycles, once this process exits: it takes seconds on a heap such as
    vLLM's, all of which the process's end gives back. vLLM does so on ROCm."""
    atexit.register(gc.freeze)


def prepare_process() -> None:
    """Set the network variables of this node that nobody set; called in a Ray worker process."""
    end_without_collecting()
    if load().node_env == "off":
        return
    groups = [group for group in GROUPS if current().kind is NPU or not group[0].startswith("HCCL_")]
    for note in prepare(node_address(), parse_driver_settings(os.environ.get(DRIVER_VARIABLE)), groups=groups).notes:
        logger.warning("%s", note)


def driver_variable() -> str:
    """The value of DRIVER_VARIABLE for processes that this one starts. Ray must be joined."""
    return driver_settings(node_address(), os.environ)


def variables_that_stay() -> set[str]:
    """This process's variables that are its node's and go nowhere, unless the user wants some copied."""
    wanted = on_request(os.environ)
    for name in sorted(wanted & NEVER_COPIED):
        logger.warning(
            "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY names %s, which is not copied: Ray counts by the list of each node. Set "
            "it before `ray start` there.",
            name,
        )
    return of_the_node(os.environ, wanted)


def node_address() -> str:
    """The address by which Ray knows this node."""
    import ray

    return str(ray.util.get_node_ip_address())
