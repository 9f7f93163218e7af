"""Our errors. Every message contains what failed, with which values, and the setting or command that fixes it.

Each message has a code of its own, such as VRA-201, whose meaning never changes: docs/errors.md lists them all.
"""

from __future__ import annotations


class VllmRayAscendError(Exception):
    """Base of all errors that this package raises itself. Their text is ``code: message``."""

    def __init__(self, code: str, message: str) -> None:
        """Take the message and its own ``code``, such as "VRA-201"."""
        super().__init__(code, message)
        self.code = code

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class SettingError(VllmRayAscendError, ValueError):
    """A VLLM_RAY_ASCEND_* variable has an invalid value."""


class NotActiveError(VllmRayAscendError, RuntimeError):
    """The plugin was requested where it cannot work: vLLM's platform is neither the NPU's nor CUDA's."""


class UpstreamChangedError(VllmRayAscendError, RuntimeError):
    """A name of vLLM, vllm-ascend or Ray that this package replaces or calls is missing in the installed version."""


class RayVersionError(VllmRayAscendError, RuntimeError):
    """Ray is missing or too old."""


class SpeculationError(VllmRayAscendError, RuntimeError):
    """Speculative decoding was requested where the installed vllm-ascend cannot do it."""


class ElasticEPError(VllmRayAscendError, RuntimeError):
    """Elastic expert parallelism was requested where it cannot work, or a scaling failed."""


class ElasticSizeError(VllmRayAscendError, ValueError):
    """An engine was requested to have a number of data parallel ranks that it cannot have."""


class ClusterResourceError(VllmRayAscendError, RuntimeError):
    """The Ray cluster cannot be joined, or does not have the NPUs that the engine needs."""


class DoctorError(VllmRayAscendError, ValueError):
    """`vllm-ray-ascend doctor` cannot do what is asked: no such check or node, a file that is no snapshot."""


class VisibleDevicesError(VllmRayAscendError, RuntimeError):
    """ASCEND_RT_VISIBLE_DEVICES names an NPU that its node does not have."""


class DeviceMappingError(VllmRayAscendError, ValueError):
    """Ranks and NPUs do not map one to one: too few NPUs, one NPU with two owners, an NPU outside the list."""


class PlacementError(VllmRayAscendError, RuntimeError):
    """An engine cannot be placed as requested: ranks that do not fit, bundles that are missing or not free."""


class ShortageError(PlacementError):
    """An engine cannot be placed now, but could be once NPUs are released or nodes join."""


class CaptureError(VllmRayAscendError, RuntimeError):
    """Work on the device would have overlapped with the capture of a graph."""


class WorkerDiedError(VllmRayAscendError, RuntimeError):
    """A worker process of an engine exited, which ends the engine."""


class WorkerFailedError(VllmRayAscendError, RuntimeError):
    """A worker raised an error that ends its engine: while it started, or in a step."""


class ControlServerError(VllmRayAscendError, RuntimeError):
    """The server that detects deaths of an engine's workers has failed, which ends the engine."""


class HeadLostError(VllmRayAscendError, RuntimeError):
    """Ray's head is gone: a worker died with it, or Ray is about to end all processes of the engine."""


class WorkerLateError(VllmRayAscendError, TimeoutError):
    """Workers did not finish a phase of the start, or a step, within its time limit."""


class RankDownError(VllmRayAscendError, RuntimeError):
    """A data parallel rank that a request or a call needs is down. It is being restarted; the other ranks serve."""


class AdapterError(VllmRayAscendError, RuntimeError):
    """A LoRA adapter is not on the node of every worker. The engine continues."""


class GraphCaptureError(VllmRayAscendError, RuntimeError):
    """ACL graphs could not be captured, and capturing fewer is switched off or would not help."""


class PipelinePairError(VllmRayAscendError, RuntimeError):
    """Two adjacent pipeline stages cannot send to each other."""


class HcclError(VllmRayAscendError, RuntimeError):
    """A function of HCCL failed, or a communicator failed during a transfer. ``hccl_code`` is HCCL's error code."""

    def __init__(self, code: str, message: str, hccl_code: int) -> None:
        super().__init__(code, message)
        self.args = (code, message, hccl_code)
        self.hccl_code = hccl_code


class TransferLateError(VllmRayAscendError, TimeoutError):
    """A tensor was not sent or received within its time limit. Its communicator is unusable."""


class TransferAbortedError(VllmRayAscendError, RuntimeError):
    """A communicator was aborted or destroyed before a tensor was sent or received."""


class TensorTransportError(VllmRayAscendError, ValueError):
    """A communicator cannot do what is requested: a tensor, a peer, or a communicator that does not fit."""


class DirectTransportError(VllmRayAscendError, RuntimeError):
    """Tensors of a Ray object cannot be sent by reference from NPU to NPU, or did not arrive."""
