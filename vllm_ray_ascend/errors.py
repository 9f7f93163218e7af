"""Our errors. Every message says what failed, with which values, and the setting or command that mends it."""

from __future__ import annotations


class VllmRayAscendError(Exception):
    """Anything that this package raises on purpose."""


class SettingError(VllmRayAscendError, ValueError):
    """A VLLM_RAY_ASCEND_* variable holds a value that it cannot have."""


class NotActiveError(VllmRayAscendError, RuntimeError):
    """The plugin was asked for where it cannot work: vLLM's platform is neither the NPU's nor CUDA's."""


class UpstreamChangedError(VllmRayAscendError, RuntimeError):
    """A name of vLLM, vllm-ascend or Ray that this package replaces or calls is gone in the installed version."""


class RayVersionError(VllmRayAscendError, RuntimeError):
    """Ray is missing or too old."""


class ClusterResourceError(VllmRayAscendError, RuntimeError):
    """The Ray cluster does not have the NPUs that the engine needs."""


class VisibleDevicesError(VllmRayAscendError, RuntimeError):
    """ASCEND_RT_VISIBLE_DEVICES names an NPU that its node does not have."""


class DeviceMappingError(VllmRayAscendError, ValueError):
    """Ranks and NPUs do not fit one to one: too few NPUs, one NPU with two owners, an NPU outside the list."""


class PlacementError(VllmRayAscendError, RuntimeError):
    """An engine cannot be placed as asked: ranks that do not fit, bundles that are not there or not free."""


class ShortageError(PlacementError):
    """An engine cannot be placed now, but could be once NPUs are given back or nodes join."""


class CaptureError(VllmRayAscendError, RuntimeError):
    """Work on the device and the capture of a graph would have met."""


class WorkerDiedError(VllmRayAscendError, RuntimeError):
    """A worker process of an engine is gone, and with it the engine."""


class WorkerFailedError(VllmRayAscendError, RuntimeError):
    """A worker raised an error that ends its engine: while it started, or in a step."""


class WorkerLateError(VllmRayAscendError, TimeoutError):
    """Workers did not finish a part of the start, or a step, in the time that it may take."""


class GraphCaptureError(VllmRayAscendError, RuntimeError):
    """ACL graphs could not be captured, and fewer were not wanted or would not help."""


class PipelinePairError(VllmRayAscendError, RuntimeError):
    """Two neighbouring stages of a pipeline cannot send to each other."""


class HcclError(VllmRayAscendError, RuntimeError):
    """A function of HCCL failed, or a communicator did while it moved tensors. ``code`` is HCCL's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class TransferLateError(VllmRayAscendError, TimeoutError):
    """A tensor did not go or come within its time limit. Its communicator is of no more use."""


class TransferAbortedError(VllmRayAscendError, RuntimeError):
    """A communicator was aborted or destroyed before a tensor had gone or come."""


class TensorTransportError(VllmRayAscendError, ValueError):
    """What is asked of a communicator cannot be: a tensor, a peer, or a communicator that does not fit."""


class DirectTransportError(VllmRayAscendError, RuntimeError):
    """Tensors of a Ray object cannot go from one process's NPU to another's by reference, or did not arrive."""


class SoftNpuError(VllmRayAscendError, RuntimeError):
    """The software NPU cannot be built, started or used here."""
