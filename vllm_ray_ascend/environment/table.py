"""The scope of each variable: the node's own, copied from the driver to every process of an engine, or a secret."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

from vllm_ray_ascend.devices.visible import VISIBLE_DEVICES
from vllm_ray_ascend.settings import VARIABLES

Scope = Literal["node", "copied", "secret", "other"]
"""Of the node: never copied from the driver. Copied: from the driver to workers and engine cores."""


class Variable(NamedTuple):
    """One variable, or all with a prefix, if ``name`` is one; its scope, and its meaning or the reason of the scope."""

    name: str
    scope: Scope
    meaning: str


DRIVER_VARIABLE = "_VLLM_RAY_ASCEND_DRIVER"
NICENESS = "RAY_worker_niceness"
"""Ray runs actors at niceness 15: on busy cores the spinning driver, and all other processes, would preempt them."""
NEVER_COPIED = frozenset({VISIBLE_DEVICES, "CUDA_VISIBLE_DEVICES"})
"""Not even on request: every node numbers its own devices, and Ray has assigned them before a copy could arrive."""

_CANN = "where CANN, or a part of it, is installed here"
_LOG = "how much CANN logs, and where"
_ALLOCATOR = "how torch_npu allocates memory"

_NODE = {
    VISIBLE_DEVICES: "which NPUs of this node may be used",
    "ASCEND_VISIBLE_DEVICES": "NPUs that Ascend's container runtime made available in this container",
    "ASCEND_DEVICE_ID": "one NPU of this node",
    "DEVICE_ID": "one NPU of this node",
    "RANK_ID": "one process's place in a rank table",
    "CUDA_VISIBLE_DEVICES": "which GPUs of this node may be used",
    "HCCL_IF_IP": "this node's address for HCCL; overrides HCCL_SOCKET_IFNAME",
    "HCCL_SOCKET_IFNAME": "this node's network interface for HCCL",
    "HCCL_IF_BASE_PORT": "first port of HCCL here; another process may use it on another node",
    "HCCL_HOST_SOCKET_PORT_RANGE": "ports of HCCL on this host; overrides HCCL_IF_BASE_PORT",
    "HCCL_NPU_SOCKET_PORT_RANGE": "ports of HCCL on this node's NPUs",
    "GLOO_SOCKET_IFNAME": "this node's network interface for gloo",
    "TP_SOCKET_IFNAME": "this node's network interface for TensorPipe",
    "VLLM_HOST_IP": "this node's address for vLLM",
    "VLLM_HOST_PORT": "a port of this node",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "this node's address for the transfer of KV caches",
    "RANK_TABLE_FILE": "a file on this node",
    "HCCL_WHITELIST_FILE": "a file on this node",
    "ASCEND_LOCAL_COMM_RES": "communication resources of this node's NPUs, set by vllm-ascend",
    "HCCL_SO_PATH": "where HCCL's library is here",
    "ASCEND_HOME_PATH": _CANN,
    "ASCEND_TOOLKIT_HOME": _CANN,
    "ASCEND_OPP_PATH": _CANN,
    "ASCEND_CUSTOM_OPP_PATH": "custom operators here; vllm-ascend and torch_npu add their own folders",
    "ASCEND_AICPU_PATH": _CANN,
    "ASCEND_NNAE_PATH": _CANN,
    "ASCEND_DRIVER_PATH": _CANN,
    "ASCEND_INSTALL_PATH": _CANN,
    "TOOLCHAIN_HOME": _CANN,
    "ATB_HOME_PATH": "where ATB is installed here",
    "ASDOPS_HOME_PATH": "where ATB's operators are installed here",
}

_COPIED = {
    DRIVER_VARIABLE: "internal: the driver's address and its own network settings",
    "HCCL_CONNECT_TIMEOUT": "seconds that ranks wait for each other when a communicator is made",
    "HCCL_EXEC_TIMEOUT": "seconds that a collective may take",
    "HCCL_EVENT_TIMEOUT": "seconds that torch_npu waits for an event of HCCL",
    "HCCL_BUFFSIZE": "MiB of HCCL's buffers for each communicator",
    "P2P_HCCL_BUFFSIZE": "MiB of HCCL's buffers for each pair that sends and receives",
    "HCCL_DETERMINISTIC": "deterministic reductions",
    "LCCL_DETERMINISTIC": "deterministic reductions",
    "HCCL_OP_EXPANSION_MODE": "where collectives are expanded: AI_CPU, AIV, HOST; all ranks must agree",
    "HCCL_ALGO": "algorithms of collectives; all ranks must agree",
    "HCCL_INTRA_ROCE_ENABLE": "RoCE instead of HCCS inside a node; all ranks must agree",
    "HCCL_INTRA_PCIE_ENABLE": "PCIe instead of RoCE inside a node; all ranks must agree",
    "HCCL_WHITELIST_DISABLE": "whether HCCL accepts only listed addresses",
    "HCCL_SOCKET_FAMILY": "IPv4 or IPv6, where HCCL finds the address by an interface",
    "HCCL_RDMA_TC": "traffic class of RoCE",
    "HCCL_RDMA_SL": "service level of RoCE",
    "HCCL_RDMA_TIMEOUT": "retransmission time of RoCE",
    "HCCL_RDMA_RETRY_CNT": "retransmissions of RoCE",
    "HCCL_ASYNC_ERROR_HANDLING": "whether torch_npu aborts a process whose collective failed",
    "HCCL_BLOCKING_WAIT": "whether waiting for a collective blocks the host",
    "HCCL_DESYNC_DEBUG": "whether torch_npu reports ranks out of step",
    "PYTORCH_NPU_ALLOC_CONF": _ALLOCATOR,
    "PYTORCH_NO_NPU_MEMORY_CACHING": _ALLOCATOR,
    "MULTI_STREAM_MEMORY_REUSE": _ALLOCATOR,
    "TASK_QUEUE_ENABLE": "how torch_npu queues operators",
    "COMBINED_ENABLE": "whether torch_npu combines operators on views",
    "STREAMS_PER_DEVICE": "size of torch_npu's pool of streams",
    "ASCEND_LAUNCH_BLOCKING": "each operator runs synchronously; for debugging",
    "CPU_AFFINITY_CONF": "binding of threads to CPU cores",
    "INF_NAN_MODE_ENABLE": "infinities and NaN as in IEEE 754",
    "ACLNN_CACHE_LIMIT": "size of the cache of operator plans",
    "ASCEND_GLOBAL_LOG_LEVEL": _LOG,
    "ASCEND_MODULE_LOG_LEVEL": _LOG,
    "ASCEND_GLOBAL_EVENT_ENABLE": _LOG,
    "ASCEND_SLOG_PRINT_TO_STDOUT": _LOG,
    "ASCEND_PROCESS_LOG_PATH": _LOG,
    "ASCEND_WORK_PATH": "folder for files that CANN does not share between nodes",
    "ASCEND_CACHE_PATH": "folder for files that CANN shares between nodes",
    "ASCEND_GLOBAL_RESOURCE_CONFIG": "network resources of KV transfers",
    "ATB_LLM_HCCL_ENABLE": "HCCL instead of LCCL in ATB",
    "OMP_NUM_THREADS": "threads of CPU operators; Ray sets it for workers where it is unset",
    "DYNAMIC_EPLB": "vllm-ascend's expert load balancing",
}

_FAMILIES = (
    Variable("SOFTNPU_", "node", "software NPUs: every node has its own devices, memory and faults"),
    Variable("LD_", "node", "libraries of this node; read when a process starts, so a later copy can only do harm"),
    Variable("VLLM_", "copied", "vLLM's and vllm-ascend's settings; vLLM itself copies them"),
    Variable("HCCL_", "copied", "HCCL's settings"),
    Variable("LCCL_", "copied", "LCCL's settings"),
    Variable("ASCEND_", "copied", "CANN's settings"),
    Variable("ACL_", "copied", "CANN's settings"),
    Variable("ATB_", "copied", "ATB's settings"),
    Variable("TORCH_HCCL_", "copied", "torch_npu's settings of HCCL"),
    Variable("TORCH_NPU_", "copied", "torch_npu's settings"),
    Variable("PYTORCH_NPU_", "copied", "torch_npu's settings"),
    Variable("NPU_ASD_", "copied", "torch_npu's detection of silent errors"),
    Variable("NPU_INDUCTOR_", "copied", "torch_npu's compiler"),
    Variable("INF_NAN_MODE_", "copied", "infinities and NaN as in IEEE 754"),
)

TABLE: Mapping[str, Variable] = {
    **{name: Variable(name, "node", meaning) for name, meaning in _NODE.items()},
    **{name: Variable(name, "copied", meaning) for name, meaning in _COPIED.items()},
}
"""The known variables. Those of scope "node" have in workers the values with which their node's raylet was started."""

_PREFIX_COPIED_BY_VLLM = (
    "VLLM_"  # vllm/ray/ray_env.py: this prefix is copied to engine actors, HCCL_ and the others are not
)
_ON_REQUEST = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
_PREFIXES_ON_REQUEST = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"

# Counts of tokens and tokenizers are not secrets: VLLM_MAX_TOKENS_PER_EXPERT, TOKENIZERS_PARALLELISM.
SECRET = (
    r"TOKEN(?!IZ|S|_THRESHOLD)|(?:API|ACCESS|AUTH)[-_]?TOKENS|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTHORIZATION|COOKIE"
    r"|(?:API|ACCESS|PRIVATE|SIGNING|ENCRYPTION|AUTH|LICENSE)[-_]?KEY|[-_](?:PASS|PWD|PAT|AUTH|KEY)\b"
)
"""Regular expression that matches the name of a secret, in either case."""
_SECRET = re.compile(SECRET, re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether a variable of this name holds a secret, which must not be logged."""
    return _SECRET.search(name) is not None


def find_variable(name: str) -> Variable | None:
    """Return the variable's entry, or one made from its prefix or as a secret; None for unknown variables."""
    if name in TABLE:
        return TABLE[name]
    family = next((entry for entry in _FAMILIES if name.startswith(entry.name)), None)
    if is_secret(name) and (family is None or family.scope != "node"):
        return Variable(name, "secret", "never shown")
    return family and family._replace(name=name)


def scope_of(name: str) -> Scope:
    """Return the variable's scope."""
    found = find_variable(name)
    return found.scope if found else "other"


def names_kept_on_node(names: Iterable[str], forced: Collection[str] = ()) -> set[str]:
    """Return those of ``names`` that stay on their node, except the ``forced`` ones, which the user wants copied."""
    return {name for name in names if scope_of(name) == "node" and (name not in forced or name in NEVER_COPIED)}


def names_copied_on_request(environ: Mapping[str, str]) -> set[str]:
    """Return the names in vLLM's VLLM_RAY_EXTRA_ENV_VARS_TO_COPY, to be copied from the driver to every node."""
    return {name.strip() for name in environ.get(_ON_REQUEST, "").split(",") if name.strip()}


def kept_prefixes_warning(environ: Mapping[str, str]) -> str | None:
    """Return a warning where a prefix in VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY is that of variables of the node.

    They stay there: a prefix such as HCCL_ is meant for all others. A variable that is named by itself is copied.
    """
    prefixes = tuple(prefix.strip() for prefix in environ.get(_PREFIXES_ON_REQUEST, "").split(",") if prefix.strip())
    kept = sorted(names_kept_on_node(environ, names_copied_on_request(environ)) - NEVER_COPIED)
    matched = [name for name in kept if prefixes and name.startswith(prefixes) and not name.startswith("VLLM_")]
    if not matched:
        return None
    return (
        f"VRA-285: {_PREFIXES_ON_REQUEST}={environ[_PREFIXES_ON_REQUEST]} matches {', '.join(matched)}, which stay on "
        f"this node, as every node has its own. To copy them all the same: {_ON_REQUEST}={','.join(matched)}."
    )


def names_to_copy(names: Iterable[str]) -> set[str]:
    """Return those of ``names`` that engine actors need from the driver and that vLLM does not copy to them itself."""
    return {name for name in names if scope_of(name) == "copied" and not name.startswith(_PREFIX_COPIED_BY_VLLM)}


def early_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that a worker needs before it imports vLLM, as Ray's runtime_env takes them.

    A worker resolves its platform while Ray unpickles its class, before the executor passes it the driver's variables:
    the choice of plugins and our switches would come too late.
    """
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in ("VLLM_PLUGINS", *VARIABLES) if name in environ}
