"""Tensors of NPUs between Ray actors by reference, with Ray's direct transport (Ray 2.56 and later) over HCCL.

name = register()  # in the process that creates the actors, before it creates them

@ray.remote(resources={"NPU": 1})
class Trainer:
    @ray.method(tensor_transport=name)
    def weights(self): ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_ray_ascend.compat.versions import installed
from vllm_ray_ascend.errors import DirectTransportError, RayVersionError
from vllm_ray_ascend.log import get_logger

if TYPE_CHECKING:
    from vllm_ray_ascend.transport.direct.manager import DirectTransport

NAME = "HCCL"
OTHER_NAME = "HCCL_DIRECT"
"""Where somebody else has, or will want, the name HCCL."""
RAY_MINIMUM = "2.56"
_RAY_ASCEND = "ray-ascend"

_log = get_logger("ray_ascend.direct")


def register(name: str | None = None) -> str:
    """Register the transport with Ray, once; the name for ``ray.method(tensor_transport=...)``.

    That is HCCL, or HCCL_DIRECT where HCCL is registered already or ray-ascend is installed, which registers its own
    transport by that name. A ``name`` of one's own is taken or refused.

    Raises RayVersionError for a Ray before 2.56, DirectTransportError where ``name`` belongs to another transport.
    """
    _require_ray()
    from ray.experimental import register_tensor_transport

    from vllm_ray_ascend.transport.direct.manager import DirectTransport

    own = _registered()
    if own is not None and (name is None or name.upper() == own):
        return own
    if own is not None:
        raise DirectTransportError(f"The direct transport is registered as {own!r} here: use that, not {name!r}.")
    chosen = (name or _free_name()).upper()
    if _taken(chosen):
        raise DirectTransportError(
            f"Ray already has a tensor transport {chosen!r} in this process, {_owner(chosen)}: ours cannot "
            f"have that name too. Call register({OTHER_NAME!r}), or register() for the next that is free, and use the "
            "name that it returns."
        )
    import torch

    register_tensor_transport(chosen, ["npu"], DirectTransport, torch.Tensor)
    if name is None and chosen != NAME:
        _log.info("Ray's direct transport over HCCL is registered as %s: %s is ray-ascend's.", chosen, NAME)
    return chosen


def use_device(device: int) -> None:
    """Receive on this NPU of the calling process, by its visible number, and not on the first that Ray assigned."""
    from vllm_ray_ascend.transport.direct.place import here

    here().chosen = device


def release() -> None:
    """Destroy the communicators of this process now, to have their memory; later transfers make new ones."""
    if (transport := _transport()) is not None:
        transport.release()


def _require_ray() -> None:
    """By what Ray 2.56 brought."""
    try:
        from ray.experimental.rdt.tensor_transport_manager import FetchRequest  # noqa: F401
    except ImportError as error:
        found = installed("ray")
        raise RayVersionError(
            f"Ray's direct transport over HCCL needs Ray {RAY_MINIMUM} or later, and "
            f"{f'Ray {found}' if found else 'no Ray'} is installed: pip install 'ray>={RAY_MINIMUM}' on every node, "
            "then restart the cluster (`ray stop`, `ray start ...`)."
        ) from error


def _free_name() -> str:
    return OTHER_NAME if installed(_RAY_ASCEND) or _taken(NAME) else NAME


def _taken(name: str) -> bool:
    from ray.experimental.rdt.util import normalize_and_validate_tensor_transport

    try:
        normalize_and_validate_tensor_transport(name)
    except ValueError:
        return False
    return True


def _owner(name: str) -> str:
    from ray.experimental.rdt.util import transport_manager_info

    found = transport_manager_info[name].transport_manager_class
    return f"{found.__module__}.{found.__qualname__}"


def _registered() -> str | None:
    """The name under which ours is registered in this process."""
    from ray.experimental.rdt.util import transport_manager_info

    from vllm_ray_ascend.transport.direct.manager import DirectTransport

    names = (name for name, info in transport_manager_info.items() if info.transport_manager_class is DirectTransport)
    return next(names, None)


def _transport() -> DirectTransport | None:
    """The object that Ray uses in this process."""
    from ray.experimental.rdt.util import get_tensor_transport_manager

    name = _registered()
    return None if name is None else get_tensor_transport_manager(name)
