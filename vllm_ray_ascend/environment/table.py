"""Which variables belong to a node, and must not be copied from the driver to workers on other nodes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from vllm_ray_ascend.settings import VARIABLES

NODE: Mapping[str, str] = {
    "ASCEND_RT_VISIBLE_DEVICES": "which NPUs of this node may be used",
    "HCCL_IF_IP": "this node's address for HCCL",
    "HCCL_IF_BASE_PORT": "first port of HCCL here; others may hold it on another node",
    "HCCL_SOCKET_IFNAME": "this node's network interface for HCCL",
    "GLOO_SOCKET_IFNAME": "this node's network interface for gloo",
    "TP_SOCKET_IFNAME": "this node's network interface for TensorPipe",
    "RANK_TABLE_FILE": "a file on this node",
    "ASCEND_LOCAL_COMM_RES": "communication resources of this node's NPUs, set by vllm-ascend",
    "ASCEND_HOME_PATH": "where CANN is installed here",
    "ASCEND_TOOLKIT_HOME": "where CANN is installed here",
    "ASCEND_OPP_PATH": "where CANN is installed here",
    "ASCEND_AICPU_PATH": "where CANN is installed here",
    "ATB_HOME_PATH": "where ATB is installed here",
    "LD_LIBRARY_PATH": "where libraries are here; read when a process starts, so a later copy does harm only",
    "LD_PRELOAD": "libraries of this node",
}
"""Variables of one node, each with its reason. Workers have the values with which their node's raylet was started."""

NODE_PREFIXES = ("SOFTNPU_",)  # software NPUs: every node has its own devices, memory and faults


def of_the_node(names: Iterable[str]) -> set[str]:
    """Those of ``names`` that stay on their node."""
    return {name for name in names if name in NODE or name.startswith(NODE_PREFIXES)}


def early_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that a worker needs before it imports vLLM, as Ray's runtime_env takes them.

    A worker resolves its platform while Ray unpickles its class, before the executor hands it the driver's variables:
    the choice of plugins and our switches would come too late.
    """
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in ("VLLM_PLUGINS", *VARIABLES) if name in environ}
