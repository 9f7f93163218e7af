"""What each process of an engine does first: set the variables of its own node, not the driver's."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm_ray_ascend.accelerators.choose import current_accelerator
from vllm_ray_ascend.devices.kind import NPU
from vllm_ray_ascend.environment.driver import NETWORK_SETTINGS, encode_driver_settings, parse_driver_settings
from vllm_ray_ascend.environment.node import apply_network_settings
from vllm_ray_ascend.environment.table import (
    DRIVER_VARIABLE,
    NEVER_COPIED,
    kept_prefixes_warning,
    names_copied_on_request,
    names_kept_on_node,
)
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import load

logger = get_logger(__name__)


class EngineLaunchContext(NamedTuple):
    """What an engine core that is a Ray actor receives with its addresses, and not through a runtime_env.

    Ray writes the variables of a runtime_env to its logs.
    """

    control_address: str
    """Address of the driver's control server, as JSON."""
    secrets: Mapping[str, str]
    """Environment variables."""
    restarts_ranks: bool = False
    """Whether the driver restarts a lost rank while the others serve."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.secrets)} secrets)"  # neither token nor secret is logged


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection, while this process imports vLLM: it frees nothing then, and takes seconds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def skip_final_gc() -> None:
    """Skip the interpreter's last garbage collection when this process exits.

    It takes seconds on a heap such as vLLM's, all of which the exit frees anyway. vLLM does so on ROCm.
    """
    atexit.register(gc.freeze)


def prepare_process() -> None:
    """Set the network variables of this node that the user has not set. Called in a Ray worker process."""
    skip_final_gc()
    if load().node_env == "off":
        return
    groups = [
        group for group in NETWORK_SETTINGS if current_accelerator().kind is NPU or not group[0].startswith("HCCL_")
    ]
    for note in apply_network_settings(
        node_address(), parse_driver_settings(os.environ.get(DRIVER_VARIABLE)), groups=groups
    ).warnings:
        logger.warning("%s", note)


def driver_settings_value() -> str:
    """Return the value of DRIVER_VARIABLE for processes that this one starts. Ray must be initialized."""
    return encode_driver_settings(node_address(), os.environ)


def node_local_variables() -> set[str]:
    """Return the names of variables that stay on this node, except those that the user wants copied."""
    wanted = names_copied_on_request(os.environ)
    for name in sorted(wanted & NEVER_COPIED):
        logger.warning(
            "VRA-306: VLLM_RAY_EXTRA_ENV_VARS_TO_COPY names %s, which is not copied: Ray assigns devices by the list "
            "of each node. Set it before `ray start` there.",
            name,
        )
    if warning := kept_prefixes_warning(os.environ):
        logger.warning("%s", warning)
    return names_kept_on_node(os.environ, wanted)


def node_address() -> str:
    """Return the address by which Ray knows this node."""
    import ray

    return str(ray.util.get_node_ip_address())


def node_id() -> str:
    """Return Ray's id of this node: several nodes, as containers of one host, may have one address."""
    import ray

    return str(ray.get_runtime_context().get_node_id())
