"""Whose a variable is: the node's, never copied there from the driver; travelling with the driver; or a secret."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

from vllm_ray_ascend.settings import VARIABLES

Belongs = Literal["node", "travels", "secret", "other"]


class Variable(NamedTuple):
    """One variable, or with a prefix for its name all that start so; whose it is, and why or what it says."""

    name: str
    belongs: Belongs
    meaning: str


DRIVER_VARIABLE = "_VLLM_RAY_ASCEND_DRIVER"
VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"
NEVER_COPIED = frozenset({VISIBLE_DEVICES, "CUDA_VISIBLE_DEVICES"})
"""Not even on request: every node counts its own, and Ray has assigned them before a copy could arrive."""

_CANN = "where CANN, or a part of it, is installed here"
_LOG = "how much CANN logs, and where"
_ALLOCATOR = "how torch_npu allocates memory"

_NODE = {
    VISIBLE_DEVICES: "which NPUs of this node may be used",
    "ASCEND_VISIBLE_DEVICES": "which NPUs Ascend's container runtime put into this container",
    "ASCEND_DEVICE_ID": "one NPU of this node",
    "DEVICE_ID": "one NPU of this node",
    "RANK_ID": "one process's place in a rank table",
    "CUDA_VISIBLE_DEVICES": "which GPUs of this node may be used",
    "HCCL_IF_IP": "this node's address for HCCL; goes before HCCL_SOCKET_IFNAME",
    "HCCL_SOCKET_IFNAME": "this node's network interface for HCCL",
    "HCCL_IF_BASE_PORT": "first port of HCCL here; others may hold it on another node",
    "HCCL_HOST_SOCKET_PORT_RANGE": "ports of HCCL on this host; goes before HCCL_IF_BASE_PORT",
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

_TRAVELS = {
    DRIVER_VARIABLE: "internal: the driver's address and its own network settings",
    "HCCL_CONNECT_TIMEOUT": "seconds that ranks wait for each other when a communicator is made",
    "HCCL_EXEC_TIMEOUT": "seconds that a collective may take",
    "HCCL_EVENT_TIMEOUT": "seconds that torch_npu waits for an event of HCCL",
    "HCCL_BUFFSIZE": "MiB of HCCL's buffers for each communicator",
    "P2P_HCCL_BUFFSIZE": "MiB of HCCL's buffers for each pair that sends and receives",
    "HCCL_DETERMINISTIC": "the same result of a reduction in every run",
    "LCCL_DETERMINISTIC": "the same result of a reduction in every run",
    "HCCL_OP_EXPANSION_MODE": "where collectives are unfolded: AI_CPU, AIV, HOST; all ranks must agree",
    "HCCL_ALGO": "algorithms of collectives; all ranks must agree",
    "HCCL_INTRA_ROCE_ENABLE": "RoCE instead of HCCS inside a node; all ranks must agree",
    "HCCL_INTRA_PCIE_ENABLE": "PCIe instead of RoCE inside a node; all ranks must agree",
    "HCCL_WHITELIST_DISABLE": "whether HCCL accepts only listed addresses",
    "HCCL_SOCKET_FAMILY": "IPv4 or IPv6, where HCCL finds the address by an interface",
    "HCCL_RDMA_TC": "traffic class of RoCE",
    "HCCL_RDMA_SL": "service level of RoCE",
    "HCCL_RDMA_TIMEOUT": "retransmission time of RoCE",
    "HCCL_RDMA_RETRY_CNT": "retransmissions of RoCE",
    "HCCL_ASYNC_ERROR_HANDLING": "whether torch_npu ends a process whose collective failed",
    "HCCL_BLOCKING_WAIT": "whether waiting for a collective blocks the host",
    "HCCL_DESYNC_DEBUG": "whether torch_npu reports ranks out of step",
    "PYTORCH_NPU_ALLOC_CONF": _ALLOCATOR,
    "PYTORCH_NO_NPU_MEMORY_CACHING": _ALLOCATOR,
    "MULTI_STREAM_MEMORY_REUSE": _ALLOCATOR,
    "TASK_QUEUE_ENABLE": "how torch_npu queues operators",
    "COMBINED_ENABLE": "whether torch_npu joins operators on views",
    "STREAMS_PER_DEVICE": "size of torch_npu's pool of streams",
    "ASCEND_LAUNCH_BLOCKING": "each operator waits for its end; for debugging",
    "CPU_AFFINITY_CONF": "binding of threads to CPU cores",
    "INF_NAN_MODE_ENABLE": "infinities and NaN as IEEE 754 has them",
    "ACLNN_CACHE_LIMIT": "size of the cache of operators' plans",
    "ASCEND_GLOBAL_LOG_LEVEL": _LOG,
    "ASCEND_MODULE_LOG_LEVEL": _LOG,
    "ASCEND_GLOBAL_EVENT_ENABLE": _LOG,
    "ASCEND_SLOG_PRINT_TO_STDOUT": _LOG,
    "ASCEND_PROCESS_LOG_PATH": _LOG,
    "ASCEND_WORK_PATH": "folder for files that CANN does not share between nodes",
    "ASCEND_CACHE_PATH": "folder for files that CANN shares between nodes",
    "ASCEND_GLOBAL_RESOURCE_CONFIG": "network resources of KV transfers",
    "ATB_LLM_HCCL_ENABLE": "HCCL instead of LCCL in ATB",
    "OMP_NUM_THREADS": "threads of CPU operators; Ray sets it for workers where nobody else does",
    "DYNAMIC_EPLB": "vllm-ascend's balancing of experts",
}

_FAMILIES = (
    Variable("SOFTNPU_", "node", "software NPUs: every node has its own devices, memory and faults"),
    Variable("LD_", "node", "libraries of this node; read when a process starts, so a later copy does harm only"),
    Variable("VLLM_", "travels", "vLLM's and vllm-ascend's settings; vLLM itself copies them"),
    Variable("HCCL_", "travels", "HCCL's settings"),
    Variable("LCCL_", "travels", "LCCL's settings"),
    Variable("ASCEND_", "travels", "CANN's settings"),
    Variable("ACL_", "travels", "CANN's settings"),
    Variable("ATB_", "travels", "ATB's settings"),
    Variable("TORCH_HCCL_", "travels", "torch_npu's settings of HCCL"),
    Variable("TORCH_NPU_", "travels", "torch_npu's settings"),
    Variable("PYTORCH_NPU_", "travels", "torch_npu's settings"),
    Variable("NPU_ASD_", "travels", "torch_npu's detection of silent errors"),
    Variable("NPU_INDUCTOR_", "travels", "torch_npu's compiler"),
    Variable("INF_NAN_MODE_", "travels", "infinities and NaN as IEEE 754 has them"),
)

TABLE: Mapping[str, Variable] = {
    **{name: Variable(name, "node", meaning) for name, meaning in _NODE.items()},
    **{name: Variable(name, "travels", meaning) for name, meaning in _TRAVELS.items()},
}
"""The known variables. Of the node's ones, workers have the values with which their node's raylet was started."""

_COPIED_BY_VLLM = "VLLM_"  # vllm/ray/ray_env.py: this prefix goes to engine actors, HCCL_ and its like do not
_ON_REQUEST = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"

# Counts of tokens and tokenizers are no secrets: VLLM_MAX_TOKENS_PER_EXPERT, TOKENIZERS_PARALLELISM.
SECRET = (
    r"TOKEN(?!IZ|S|_THRESHOLD)|(?:API|ACCESS|AUTH)[-_]?TOKENS|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTHORIZATION|COOKIE"
    r"|(?:API|ACCESS|PRIVATE|SIGNING|ENCRYPTION|AUTH|LICENSE)[-_]?KEY|[-_](?:PASS|PWD|PAT|AUTH)\b"
)
"""Regular expression for what makes a name a secret's, in either case."""
_SECRET = re.compile(SECRET, re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds what nobody may read in a log."""
    return _SECRET.search(name) is not None


def find(name: str) -> Variable | None:
    """The variable's entry, or one made for it after its name; None where nothing is known of it."""
    if name in TABLE:
        return TABLE[name]
    family = next((entry for entry in _FAMILIES if name.startswith(entry.name)), None)
    if is_secret(name) and (family is None or family.belongs != "node"):
        return Variable(name, "secret", "never shown")
    return family and family._replace(name=name)


def belongs(name: str) -> Belongs:
    """Whose the variable is."""
    found = find(name)
    return found.belongs if found else "other"


def of_the_node(names: Iterable[str], forced: Collection[str] = ()) -> set[str]:
    """Those of ``names`` that stay on their node, less the ``forced`` ones, which the user wants copied."""
    return {name for name in names if belongs(name) == "node" and (name not in forced or name in NEVER_COPIED)}


def on_request(environ: Mapping[str, str]) -> set[str]:
    """Names in vLLM's VLLM_RAY_EXTRA_ENV_VARS_TO_COPY, which go from the driver to every node: ``forced`` above."""
    return {name.strip() for name in environ.get(_ON_REQUEST, "").split(",") if name.strip()}


def travelling(names: Iterable[str]) -> set[str]:
    """Those of ``names`` that engine actors need from the driver and that vLLM does not copy to them itself."""
    return {name for name in names if belongs(name) == "travels" and not name.startswith(_COPIED_BY_VLLM)}


def early_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that a worker needs before it imports vLLM, as Ray's runtime_env takes them.

    A worker resolves its platform while Ray unpickles its class, before the executor hands it the driver's variables:
    the choice of plugins and our switches would come too late.
    """
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in ("VLLM_PLUGINS", *VARIABLES) if name in environ}
