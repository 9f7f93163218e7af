"""Meaning and remedy of an error of torch, CUDA or NCCL, by its text. Pure."""

from __future__ import annotations

import re

_FIRST_ERROR = "Look for the first error in the logs of all ranks"
_NCCL_INFO = "Set NCCL_DEBUG=INFO before `ray start` to see more."
_GPU_HEALTH = "`nvidia-smi` and `dmesg` (Xid) on that node show the GPU's health."

_TEXTS: tuple[tuple[str, str, str], ...] = (
    (
        r"operation not permitted when stream is capturing|StreamCaptureUnsupported",
        "a call that no capture allows (a copy to the host, an allocation, a wait) was made during one, by any thread",
        "Keep other threads off the GPU while graphs are captured (connectors, weight transfer), or --enforce-eager.",
    ),
    (
        r"StreamCaptureInvalidated|operation failed due to a previous error during capture",
        "the capture of a graph was broken by a call that it does not allow",
        f"{_FIRST_ERROR}: it names that call. Or --enforce-eager.",
    ),
    (
        r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU is out of memory",
        "Lower --gpu-memory-utilization, --max-model-len or --max-num-seqs; `nvidia-smi` shows who else has memory.",
    ),
    (
        r"NCCL error[^\n]*remote process exited|ncclRemoteError",
        "another rank is gone, or the network between two of them broke",
        f"{_FIRST_ERROR}; the rank that died has logged it.",
    ),
    (
        r"NCCL error[^\n]*unhandled system error|ncclSystemError",
        "NCCL could not use the network or shared memory of a node",
        f"See NCCL_SOCKET_IFNAME, firewalls between the nodes, and room in /dev/shm. {_NCCL_INFO}",
    ),
    (
        r"NCCL error[^\n]*unhandled cuda error|ncclUnhandledCudaError",
        "a call of CUDA failed inside NCCL: out of memory, a GPU that two ranks share, or drivers that differ",
        f"{_FIRST_ERROR}. {_NCCL_INFO}",
    ),
    (
        r"NCCL error[^\n]*invalid usage|ncclInvalidUsage|Duplicate GPU detected",
        "ranks of one communicator share a GPU, or disagree about it",
        "Give every rank a GPU of its own (`vllm-ray-ascend topology`).",
    ),
    (r"NCCL error[^\n]*internal error|ncclInternalError", "NCCL failed internally", f"{_FIRST_ERROR}. {_NCCL_INFO}"),
    (
        r"No CUDA GPUs are available|no CUDA-capable device is detected",
        "this process sees no GPU",
        "See CUDA_VISIBLE_DEVICES of the node's `ray start`, and `nvidia-smi` there.",
    ),
    (
        r"invalid device ordinal",
        "there is no GPU with this number",
        "Numbers count within CUDA_VISIBLE_DEVICES of the node's `ray start`; `nvidia-smi -L` lists the GPUs.",
    ),
    (
        r"illegal memory access|device-side assert triggered|misaligned address",
        "a kernel failed on the GPU, as for an index outside of its tensor",
        "Set CUDA_LAUNCH_BLOCKING=1 to see which it is.",
    ),
    (
        r"uncorrectable ECC error|unspecified launch failure|GPU has fallen off the bus",
        "the GPU is faulty",
        _GPU_HEALTH,
    ),
)
_KNOWN_TEXTS = tuple((re.compile(pattern, re.IGNORECASE), what, remedy) for pattern, what, remedy in _TEXTS)


def explain_text(text: str) -> str | None:
    """Return meaning and remedy of an error's message; None where none is known."""
    for pattern, what, remedy in _KNOWN_TEXTS:
        if (found := pattern.search(text)) is not None:
            return f"{found.group()}: {what}. {remedy}"
    return None
