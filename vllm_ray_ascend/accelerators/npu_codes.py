"""Meaning and remedy of the codes of HCCL, CANN's runtime and its driver.

Codes: HcclResult in CANN's hccl/hccl_types.h, aclError in acl/error_codes/rt_error_codes.h, EI and EJ numbers in CANN's
pages on collective communication. Remedies are from those pages and from vllm-ascend's issues.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Meaning(NamedTuple):
    """CANN's name of a code, what happened, and what to do."""

    name: str
    what: str
    remedy: str


_FIRST_ERROR = "Look for the first error in the logs of all ranks"
PLOG = f"{_FIRST_ERROR}, and in CANN's own log under ~/ascend/log/debug/plog of that node."
_SAME_VERSIONS = (
    "See that all nodes have the same CANN, driver and torch_npu and the same HCCL_* "
    "(`vllm-ray-ascend env --variables`)"
)
_CHECK_LINK = (
    "`vllm-ray-ascend doctor --level full` shows whether the NPUs of all nodes have links, addresses and the same TLS "
    "switch, and whether they reach each other."
)
_CHECK_INTERFACE = (
    "See that HCCL_IF_IP and HCCL_SOCKET_IFNAME belong to this node (`ip -brief address`), or unset them: they are "
    "derived from Ray's address."
)
_FREE_PORTS = (
    "Another process has the port: end leftovers of earlier engines (`npu-smi info`), leave the ports to "
    "VLLM_RAY_ASCEND_NODE_ENV=derive, or set HCCL_HOST_SOCKET_PORT_RANGE=auto, on Atlas A2 HCCL_IF_BASE_PORT."
)
_LATE_RANK = (
    "A rank died or is late: look for the first error of the others. If they only start slowly, raise "
    "HCCL_CONNECT_TIMEOUT"
)
FEWER_GRAPHS = (
    "Capture fewer sizes (--compilation-config '{\"cudagraph_capture_sizes\": [1, 2, 4]}'), decode steps only "
    '(\'{"cudagraph_mode": "FULL_DECODE_ONLY"}\'), or none (--enforce-eager)'
)
_LESS_MEMORY = (
    "Lower --gpu-memory-utilization, --max-model-len or --max-num-seqs; `npu-smi info` shows which processes hold "
    "memory."
)
_FIND_OPERATOR = (
    "Set ASCEND_LAUNCH_BLOCKING=1 to see which operator it is, and compare the versions of CANN, driver, torch_npu and "
    "vllm-ascend with vllm-ascend's table."
)
_CHECK_NPU = (
    "`npu-smi info` and `dmesg` on that node show the NPU's health; take it out of ASCEND_RT_VISIBLE_DEVICES if it is "
    "faulty."
)

HCCL: Mapping[int, Meaning] = {
    1: Meaning(
        "HCCL_E_PARA",
        "ranks disagree about the communicator, or HCCL was given a wrong value",
        f"{_SAME_VERSIONS}; unset RANK_TABLE_FILE.",
    ),
    2: Meaning(
        "HCCL_E_PTR",
        "HCCL was called with a communicator or buffer that does not exist, as after an earlier error",
        PLOG,
    ),
    3: Meaning(
        "HCCL_E_MEMORY",
        "no memory for HCCL's buffers",
        f"Lower HCCL_BUFFSIZE (MiB for each communicator). {_LESS_MEMORY}",
    ),
    4: Meaning("HCCL_E_INTERNAL", "HCCL failed internally", PLOG),
    5: Meaning(
        "HCCL_E_NOT_SUPPORT",
        "this HCCL does not support the requested operation on this hardware",
        "Unset HCCL_OP_EXPANSION_MODE and HCCL_ALGO, or install the CANN that vllm-ascend's version requires.",
    ),
    6: Meaning(
        "HCCL_E_NOT_FOUND",
        "HCCL did not find a network interface, an address of an NPU, or a communicator",
        f"{_CHECK_INTERFACE} `hccn_tool -i N -ip -g` shows the NPU's own address.",
    ),
    7: Meaning(
        "HCCL_E_UNAVAIL",
        "a resource that HCCL needs is taken or gone: the NPU's network, a port, a communicator",
        f"End leftovers of earlier engines (`npu-smi info`), then start again. {_CHECK_LINK}",
    ),
    8: Meaning(
        "HCCL_E_SYSCALL",
        "a call of the operating system failed",
        "See `ulimit -n`, space in /dev/shm, and `dmesg` on that node.",
    ),
    9: Meaning(
        "HCCL_E_TIMEOUT",
        "a rank did not connect or respond within HCCL_CONNECT_TIMEOUT or HCCL_EXEC_TIMEOUT",
        f"{_LATE_RANK}.",
    ),
    10: Meaning(
        "HCCL_E_OPEN_FILE_FAILURE",
        "HCCL cannot open a file",
        "See that RANK_TABLE_FILE, if set, is readable on that node; unset it otherwise.",
    ),
    11: Meaning(
        "HCCL_E_TCP_CONNECT",
        "HCCL could not listen on a port of this node, or could not reach another rank's port",
        f"{_FREE_PORTS} Between nodes, see that no firewall closes those ports. {_CHECK_INTERFACE}",
    ),
    12: Meaning("HCCL_E_ROCE_CONNECT", "no RoCE connection between two NPUs", _CHECK_LINK),
    13: Meaning(
        "HCCL_E_TCP_TRANSFER",
        "a connection between two hosts broke",
        f"{_FIRST_ERROR}: most often the other rank has died.",
    ),
    14: Meaning("HCCL_E_ROCE_TRANSFER", "a RoCE transfer between two NPUs failed", _CHECK_LINK),
    15: Meaning(
        "HCCL_E_RUNTIME",
        "a call of CANN's runtime failed: no device set in this thread, no memory, no stream left",
        f"{_FIRST_ERROR}: it carries the runtime's own code.",
    ),
    16: Meaning("HCCL_E_DRV", "a call of the NPU's driver failed", _CHECK_NPU),
    17: Meaning("HCCL_E_PROFILING", "profiling of HCCL failed", "Start without profiling."),
    18: Meaning("HCCL_E_CCE", "an instruction of the NPU for a collective failed", PLOG),
    19: Meaning(
        "HCCL_E_NETWORK",
        "HCCL's network could not be set up: most often its port is taken",
        f"{_FREE_PORTS} {_CHECK_LINK}",
    ),
    20: Meaning(
        "HCCL_E_AGAIN",
        "the communicator is in use by a call of another thread",
        "Try again once that has ended; if it stays so, end the process.",
    ),
    21: Meaning(
        "HCCL_E_REMOTE",
        "the peer of a collective is gone (error CQE): its process died, or the link broke",
        f"{_FIRST_ERROR}; the rank that died has logged it. {_CHECK_LINK}",
    ),
    22: Meaning(
        "HCCL_E_SUSPENDING",
        "the communicator is suspended, as in sleep or recovery",
        "Wake the engine before it is used (/wake_up).",
    ),
    23: Meaning("HCCL_E_OPRETRY_FAIL", "a collective could not be repeated after a link fault", _CHECK_LINK),
    24: Meaning(
        "HCCL_E_OOM", "no device memory for HCCL", f"Lower HCCL_BUFFSIZE (MiB for each communicator). {_LESS_MEMORY}"
    ),
}

RUNTIME: Mapping[int, Meaning] = {
    107001: Meaning(
        "ACL_ERROR_RT_INVALID_DEVICEID",
        "there is no NPU with this number",
        "Numbers count within ASCEND_RT_VISIBLE_DEVICES of the node's `ray start`; `npu-smi info` lists the NPUs.",
    ),
    107002: Meaning(
        "ACL_ERROR_RT_CONTEXT_NULL",
        "the thread has no NPU set",
        "Each thread has to set it first: torch.npu.set_device(worker.device). From CANN 8.3 on, one that has not uses "
        "the first visible NPU without an error.",
    ),
    107003: Meaning(
        "ACL_ERROR_RT_STREAM_CONTEXT",
        "a stream of another NPU, or one that is gone, was used",
        "Set the device of the thread before it makes or uses a stream.",
    ),
    107019: Meaning(
        "ACL_ERROR_RT_WAIT_TIMEOUT",
        "an event or value that a stream waits for was not written in time",
        f"{_FIRST_ERROR}: the rank or stream that should have written it has failed.",
    ),
    107020: Meaning(
        "ACL_ERROR_RT_TASK_TIMEOUT",
        "a task, or a collective, did not end in time",
        f"{_FIRST_ERROR}: in a collective another rank is late or dead (HCCL_EXEC_TIMEOUT).",
    ),
    107022: Meaning(
        "ACL_ERROR_RT_DEVICE_TASK_ABORT", "the tasks of the NPU are being aborted", "Start the engine again."
    ),
    107025: Meaning(
        "ACL_ERROR_RT_STREAM_UNJOINED",
        "a capture ended before a stream that it used was joined back",
        f"{_FIRST_ERROR}: the model raised an error in the middle of a capture. Or use --enforce-eager.",
    ),
    107027: Meaning(
        "ACL_ERROR_RT_STREAM_CAPTURED",
        "a stream was waited for while it is captured",
        "Wait before or after the capture, not in it; or use --enforce-eager.",
    ),
    107028: Meaning(
        "ACL_ERROR_RT_EVENT_CAPTURED",
        "an event of a capture was waited for or queried",
        "Use another event outside of the capture; or use --enforce-eager.",
    ),
    107030: Meaning(
        "ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT",
        "a call that no capture allows (a copy to or from the host, an allocation, a wait) was made during one, by "
        "this or another thread",
        "Keep other threads off the NPU while graphs are captured (connectors, weight transfer), or use "
        "--enforce-eager.",
    ),
    207001: Meaning("ACL_ERROR_RT_MEMORY_ALLOCATION", "the NPU is out of memory", _LESS_MEMORY),
    207004: Meaning("ACL_ERROR_RT_NO_DEVICE", "the NPU is not available", _CHECK_NPU),
    207005: Meaning(
        "ACL_ERROR_RT_RESOURCE_ALLOC_FAIL",
        "no resource of the runtime is left; during a capture, mostly streams",
        f"{FEWER_GRAPHS}; a newer HDK and CANN have more streams for captures.",
    ),
    207007: Meaning("ACL_ERROR_RT_NO_EVENT_RESOURCE", "no event is left", f"{FEWER_GRAPHS}."),
    207008: Meaning(
        "ACL_ERROR_RT_NO_STREAM_RESOURCE",
        "no stream is left: graphs and communicators use them up",
        f"{FEWER_GRAPHS}; a newer HDK and CANN have more streams for captures.",
    ),
    207018: Meaning("ACL_ERROR_RT_DEVICE_OOM", "the NPU is out of memory", _LESS_MEMORY),
    507010: Meaning("ACL_ERROR_RT_LOST_HEARTBEAT", "the NPU's scheduler does not respond any more", _CHECK_NPU),
    507011: Meaning(
        "ACL_ERROR_RT_MODEL_EXECUTE",
        "a graph failed while it was replayed",
        f"{_FIRST_ERROR}; with --enforce-eager the operator itself is named. {_FIND_OPERATOR}",
    ),
    507014: Meaning(
        "ACL_ERROR_RT_AICORE_TIMEOUT",
        "an operator did not end in time; with expert parallelism, often because another rank is stuck or gone",
        f"{_FIRST_ERROR}. Try without --enable-expert-parallel to distinguish the two. {_FIND_OPERATOR}",
    ),
    507015: Meaning(
        "ACL_ERROR_RT_AICORE_EXCEPTION",
        "an operator failed on the NPU, as for an index outside of its tensor",
        _FIND_OPERATOR,
    ),
    507017: Meaning("ACL_ERROR_RT_AICPU_TIMEOUT", "an operator on the NPU's CPU did not end in time", _FIND_OPERATOR),
    507018: Meaning("ACL_ERROR_RT_AICPU_EXCEPTION", "an operator failed on the NPU's CPU", _FIND_OPERATOR),
    507033: Meaning(
        "ACL_ERROR_RT_DEV_SETUP_ERROR",
        "the NPU does not open: another process has it, /dev/davinci* is missing in the container, or it is faulty",
        f"End leftovers of earlier engines, see that the container has the device files. {_CHECK_NPU}",
    ),
    507034: Meaning(
        "ACL_ERROR_RT_VECTOR_CORE_TIMEOUT", "an operator did not end in time", f"{_FIRST_ERROR}. {_FIND_OPERATOR}"
    ),
    507035: Meaning(
        "ACL_ERROR_RT_VECTOR_CORE_EXCEPTION",
        "an operator failed on the NPU, as for an index outside of its tensor",
        _FIND_OPERATOR,
    ),
    507046: Meaning(
        "ACL_ERROR_RT_STREAM_SYNC_TIMEOUT",
        "a stream did not end in time",
        f"{_FIRST_ERROR}: another rank is late or dead, or an operator hangs.",
    ),
    507047: Meaning(
        "ACL_ERROR_RT_EVENT_SYNC_TIMEOUT",
        "an event was not recorded in time",
        f"{_FIRST_ERROR}: another rank is late or dead, or an operator hangs.",
    ),
    507053: Meaning("ACL_ERROR_RT_DEVICE_MEM_ERROR", "the NPU's memory is faulty", _CHECK_NPU),
    507054: Meaning("ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR", "the NPU's memory is faulty (ECC)", _CHECK_NPU),
    507056: Meaning("ACL_ERROR_RT_LINK_ERROR", "the link between NPUs broke", _CHECK_LINK),
    507057: Meaning(
        "ACL_ERROR_RT_SUSPECT_REMOTE_ERROR", "another NPU is suspected to have failed", f"{_FIRST_ERROR}. {_CHECK_LINK}"
    ),
    507899: Meaning("ACL_ERROR_RT_DRV_INTERNAL_ERROR", "the NPU's driver failed", _CHECK_NPU),
    507901: Meaning(
        "ACL_ERROR_RT_SOCKET_CLOSE",
        "the connection to the NPU was closed: the NPU or its process was reset",
        _CHECK_NPU,
    ),
    507903: Meaning(
        "ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED",
        "the capture of a graph was broken by a call that it does not allow",
        f"{_FIRST_ERROR}: it names that call. Or use --enforce-eager.",
    ),
}

NUMBERED: Mapping[str, Meaning] = {
    "EI0002": Meaning(
        "EI0002",
        "a collective waited for another rank until it timed out (HCCL_EXEC_TIMEOUT)",
        f"{_FIRST_ERROR}: that rank has died, hangs, or runs another collective. {_CHECK_LINK}",
    ),
    "EI0006": Meaning("EI0006", "a rank did not connect within HCCL_CONNECT_TIMEOUT", f"{_LATE_RANK}. {_CHECK_LINK}"),
    "EI0013": Meaning(
        "EI0013",
        "a RoCE transfer failed (error CQE): the other process is gone, or the network broke",
        f"{_FIRST_ERROR}. {_CHECK_LINK}",
    ),
    "EI0019": Meaning("EI0019", "HCCL's port is taken", _FREE_PORTS),
    "EJ0003": Meaning("EJ0003", "HCCL's port is taken", _FREE_PORTS),
}
