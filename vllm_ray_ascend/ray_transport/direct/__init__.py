"""Tensors of NPUs between Ray actors by reference, with Ray's direct transport (Ray 2.56 and later) over HCCL.

name = register()  # in the process that creates the actors, before it creates them

@ray.remote(resources={"NPU": 1})
class Trainer:
    @ray.method(tensor_transport=name)
    def weights(self): ...
"""

from __future__ import annotations

import functools

from vllm_ray_ascend.compat.versions import installed
from vllm_ray_ascend.errors import DirectTransportError, RayVersionError
from vllm_ray_ascend.log import get_logger

NAME = "HCCL"
OTHER_NAME = "HCCL_DIRECT"
"""Used where another transport has, or will want, the name HCCL."""
WEIGHTS_BACKEND = "hccl_direct"
"""Of vLLM's weight transfer API."""
RAY_MINIMUM = "2.56"
_RAY_ASCEND = "ray-ascend"

_log = get_logger("ray_ascend.direct")


def register(name: str | None = None) -> str:
    """Register the transport with Ray, once; return the name for ``ray.method(tensor_transport=...)``.

    That is HCCL, or HCCL_DIRECT where HCCL is registered already or ray-ascend is installed, which registers its own
    transport by that name. A ``name`` that is given is used, or an error.

    Raises RayVersionError for a Ray before 2.56, DirectTransportError where ``name`` belongs to another transport.
    """
    _require_ray()
    from ray.experimental import register_tensor_transport

    from vllm_ray_ascend.ray_transport.direct.manager import DirectTransport

    registered = _registered_name()
    if registered is not None and (name is None or name.upper() == registered):
        return registered
    if registered is not None:
        raise DirectTransportError(
            "VRA-526", f"The direct transport is registered as {registered!r} here: use that, not {name!r}."
        )
    chosen = (name or _choose_name()).upper()
    if _is_registered(chosen):
        raise DirectTransportError(
            "VRA-527",
            f"Ray already has a tensor transport {chosen!r} in this process, {_manager_class_name(chosen)}: ours "
            f"cannot have that name too. Call register({OTHER_NAME!r}), or register() for a name that is free, and "
            "use the name that it returns.",
        )
    import torch

    register_tensor_transport(chosen, ["npu"], DirectTransport, torch.Tensor)
    if name is None and chosen != NAME:
        _log.info("Ray's direct transport over HCCL is registered as %s: %s is ray-ascend's.", chosen, NAME)
    return chosen


@functools.cache
def register_weights_backend() -> None:
    """Register this transport with vLLM as a way for new weights: `WeightTransferConfig(backend="hccl_direct")`."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    module = "vllm_ray_ascend.ray_transport.direct.weight_transfer"
    WeightTransferEngineFactory.register_engine(WEIGHTS_BACKEND, module, "DirectWeightTransferEngine")
    WeightTransferTrainerFactory.register_engine(WEIGHTS_BACKEND, module, "DirectTrainerWeightTransferEngine")


def use_device(device: int) -> None:
    """Receive on this NPU of the calling process, by its visible index, and not on the first that Ray assigned."""
    from vllm_ray_ascend.ray_transport.direct.local_endpoint import get_local_endpoint

    get_local_endpoint().selected_device = device


def release() -> None:
    """Destroy the communicators of this process now, to free their memory; later transfers create new ones."""
    from ray.experimental.rdt.util import get_tensor_transport_manager

    if (name := _registered_name()) is not None:
        get_tensor_transport_manager(name).release()


def _require_ray() -> None:
    """Raise RayVersionError unless Ray has what Ray 2.56 introduced."""
    try:
        from ray.experimental.rdt.tensor_transport_manager import FetchRequest  # noqa: F401
    except ImportError as error:
        found = installed("ray")
        raise RayVersionError(
            "VRA-528",
            f"Ray's direct transport over HCCL needs Ray {RAY_MINIMUM} or later, and "
            f"{f'Ray {found}' if found else 'no Ray'} is installed: pip install 'ray>={RAY_MINIMUM}' on every node, "
            "then restart the cluster (`ray stop`, `ray start ...`).",
        ) from error


def _choose_name() -> str:
    return OTHER_NAME if installed(_RAY_ASCEND) or _is_registered(NAME) else NAME


def _is_registered(name: str) -> bool:
    from ray.experimental.rdt.util import normalize_and_validate_tensor_transport

    try:
        normalize_and_validate_tensor_transport(name)
    except ValueError:
        return False
    return True


def _manager_class_name(name: str) -> str:
    from ray.experimental.rdt.util import transport_manager_info

    manager_class = transport_manager_info[name].transport_manager_class
    return f"{manager_class.__module__}.{manager_class.__qualname__}"


def _registered_name() -> str | None:
    """Return the name under which this transport is registered in this process."""
    from ray.experimental.rdt.util import transport_manager_info

    from vllm_ray_ascend.ray_transport.direct.manager import DirectTransport

    names = (name for name, info in transport_manager_info.items() if info.transport_manager_class is DirectTransport)
    return next(names, None)
