"""Ray Serve LLM on NPUs: what its configuration (Ray 2.56 and later) says of GPUs alone holds for NPUs too.

Ray knows kinds of accelerators; "gpu" is what it takes where no other is named. Here that kind means the accelerator of
this process's platform: bundles that name NPUs are of it, the bundles that Ray makes by itself name NPUs, and the task
that makes the engine's configuration asks for a part of an NPU. Bundles that name GPUs are left as they are. Where Ray
has a kind for NPUs of its own, nothing is changed.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, EnumMeta
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from vllm_ray_ascend import patches
from vllm_ray_ascend.errors import UpstreamChangedError
from vllm_ray_ascend.log import get_logger

_ACCELERATORS = "ray.llm._internal.serve.core.configs.accelerators"
_LLM_CONFIG = "ray.llm._internal.serve.core.configs.llm_config"
_VLLM_MODELS = "ray.llm._internal.serve.engines.vllm.vllm_models"
_VLLM_ENGINE = "ray.llm._internal.serve.engines.vllm.vllm_engine"
_KV_TRANSFER = "ray.llm._internal.serve.engines.vllm.kv_transfer.factory"
_MULTI_CONNECTOR = "ray.llm._internal.serve.engines.vllm.kv_transfer.multi_connector"
_EXECUTOR = "vllm.v1.executor.abstract"
_MOONCAKE_CONNECTORS = ("MooncakeConnectorV1", "MooncakeHybridConnector")
"""Those of vllm-ascend's that follow Ray's default protocol: prefill answers with what decode needs to fetch."""
_NPU, _GPU = "NPU", "GPU"
_SOC_PREFIX = "Ascend"
_CONFIG_TASK_SHARE = 0.001
"""Of an NPU, as Ray takes it of a GPU: enough that the task runs on a node with one, beside the engine's workers."""
_NAME_NPUS = 'Name them: placement_group_config={"bundle_per_worker": {"CPU": 1, "NPU": 1}} in LLMConfig'
_NO_PORTS = "Give each replica of Mooncake a `kv_port` and an `engine_id` of its own"

logger = get_logger(__name__)


@functools.cache
def hooks(is_npu: Callable[[], bool]) -> Mapping[str, Callable[[ModuleType], None]]:
    """Return what to do with each module once it was imported. ``is_npu`` says whether the platform has NPUs."""
    return {
        _EXECUTOR: _load_plugins_before_choice,
        _ACCELERATORS: functools.partial(_default_to_npus, is_npu),
        _LLM_CONFIG: functools.partial(_accept_npus, is_npu),
        _VLLM_MODELS: _accept_npu_shares,
        _VLLM_ENGINE: _stop_engines_in_order,
        _KV_TRANSFER: _add_mooncake,
        _MULTI_CONNECTOR: _keep_settings_of_connectors,
    }


def _load_plugins_before_choice(module: ModuleType) -> None:
    """Let `Executor.get_class` of ``module`` load vLLM's general plugins first.

    Whoever builds EngineArgs has loaded them, but Ray Serve builds these in another process than the engine's.
    """
    patches.wrap("vllm.v1.executor.abstract.Executor.get_class", _loading_plugins, module.Executor)


def _loading_plugins(get_class: Callable[[Any], Any]) -> staticmethod[[Any], Any]:
    @functools.wraps(get_class)
    def load_and_get_class(vllm_config: Any) -> Any:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        return get_class(vllm_config)

    return staticmethod(load_and_get_class)


def _default_to_npus(is_npu: Callable[[], bool], _: ModuleType) -> None:
    """Let the GPU backend of _ACCELERATORS ask for NPUs where the platform ``is_npu``."""
    if not _lacks_npus():
        return

    def bundles_of_platform(upstream: Any) -> Any:
        @functools.wraps(upstream)
        def default_bundles(*args: Any, **kwargs: Any) -> list[dict[str, float]]:
            bundles: list[dict[str, float]] = upstream(*args, **kwargs)
            return [_renamed(bundle, _GPU, _NPU) for bundle in bundles] if is_npu() else bundles

        return default_bundles

    def options_of_platform(upstream: Any) -> Any:
        @functools.wraps(upstream)
        def get_remote_options(*args: Any, **kwargs: Any) -> dict[str, Any]:
            options: dict[str, Any] = upstream(*args, **kwargs)
            if is_npu() and options.pop("num_gpus", None) is not None:
                options["resources"] = {_NPU: _CONFIG_TASK_SHARE}
            return options

        return get_remote_options

    _wrap(f"{_ACCELERATORS}.GPUAccelerator.default_bundles", bundles_of_platform)
    _wrap(f"{_ACCELERATORS}.GPUAccelerator.get_remote_options", options_of_platform)


def _accept_npus(is_npu: Callable[[], bool], _: ModuleType) -> None:
    """Let `LLMConfig` of _LLM_CONFIG take bundles with NPUs, and the names of Ascend's chips and of no other ones."""
    if not _lacks_npus():
        return
    _wrap(f"{_LLM_CONFIG}.infer_hardware_kind_from_bundles", _with_npus_as_gpus)
    _wrap(f"{_LLM_CONFIG}.AcceleratorType", with_soc_names)
    _wrap(
        f"{_LLM_CONFIG}.LLMConfig._check_accelerator_type_matches_hardware",
        functools.partial(_without_other_chips, is_npu),
    )


def _without_other_chips(is_npu: Callable[[], bool], check: Callable[..., None]) -> Callable[..., None]:
    """Return ``check`` of an LLMConfig, which drops the name of a GPU where the engine's bundles are of NPUs.

    Ray's own examples name one (A10G). No node has it and NPUs, so that the replica would wait forever.
    """

    @functools.wraps(check)
    def drop_and_check(config: Any, *args: Any, **kwargs: Any) -> None:
        name = str(getattr(config.accelerator_type, "value", config.accelerator_type or ""))
        is_of_npus = config.accelerator_config.kind == "gpu" and is_npu() and not _names_gpus(config)
        if name and is_of_npus and not name.startswith(_SOC_PREFIX):
            logger.warning(
                "VRA-144: accelerator_type=%r in LLMConfig is ignored: the engine's bundles are of NPUs, and no node "
                "has both. Remove it, or name a chip that `ray status -v` lists as accelerator_type:Ascend...",
                name,
            )
            config.accelerator_type = None
        check(config, *args, **kwargs)

    return drop_and_check


def _names_gpus(config: Any) -> bool:
    groups = config.placement_group_config or {}
    return any(bundle.get(_GPU) for bundle in [groups.get("bundle_per_worker") or {}, *(groups.get("bundles") or ())])


def _accept_npu_shares(_: ModuleType) -> None:
    """Let `VLLMEngineConfig` of _VLLM_MODELS take the share of a worker from bundles with parts of NPUs."""
    if _lacks_npus():
        _wrap(
            f"{_VLLM_MODELS}.VLLMEngineConfig._detect_fractional_gpu_from_pg",
            lambda upstream: staticmethod(_with_npus_as_gpus(upstream)),
        )


def _stop_engines_in_order(module: ModuleType) -> None:
    """Let a replica that Serve ends shut its engine down first, where ``module`` (_VLLM_ENGINE) has a hook for that.

    Ray ends the replica's process with all of its children: the engine core cannot order its workers to stop.
    """
    if hasattr(module.VLLMEngine, "shutdown"):
        patches.wrap(f"{_VLLM_ENGINE}.VLLMEngine.shutdown", _shutting_down_engine)


def _shutting_down_engine(shut_down: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(shut_down)
    async def shut_down_with_engine(engine: Any, *args: Any, **kwargs: Any) -> None:
        await shut_down(engine, *args, **kwargs)
        if (client := engine._engine_client) is not None:
            await asyncio.to_thread(client.shutdown)

    return shut_down_with_engine


def _add_mooncake(module: ModuleType) -> None:
    """Let the factory of ``module`` (_KV_TRANSFER) have our backend for vllm-ascend's connectors.

    Nothing is registered: that would hold for all of the cluster, also for applications without this package. Ray
    before 2.57 has no protocol of prefill and decode that these connectors could follow.
    """
    if hasattr(module, "DefaultConnectorBackend"):
        _wrap(f"{_KV_TRANSFER}.KVConnectorBackendFactory.get_backend_class", _with_mooncake, _NO_PORTS)


def _with_mooncake(get_class: Callable[..., Any]) -> staticmethod[..., Any]:
    factory = get_class.__self__  # type: ignore[attr-defined]  # it is a class method

    @functools.wraps(get_class)
    def get_backend_class(name: str, *args: Any, **kwargs: Any) -> Any:
        if name not in _MOONCAKE_CONNECTORS or factory.is_registered(name):
            return get_class(name, *args, **kwargs)
        from vllm_ray_ascend.compat.mooncake import MooncakeBackend

        return MooncakeBackend

    return staticmethod(get_backend_class)


def _keep_settings_of_connectors(_: ModuleType) -> None:
    """Let a MultiConnector of _MULTI_CONNECTOR use what our backend sets: Ray sets it in a copy that it drops."""
    if hasattr(import_module(_KV_TRANSFER), "DefaultConnectorBackend"):
        _wrap(f"{_MULTI_CONNECTOR}.MultiConnectorBackend.setup", _keeping_settings, _NO_PORTS)


def _keeping_settings(setup: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(setup)
    def setup_and_keep(backend: Any, *args: Any, **kwargs: Any) -> None:
        setup(backend, *args, **kwargs)
        connectors = backend.kv_transfer_config["kv_connector_extra_config"]["connectors"]
        for connector, made in zip(connectors, backend._connector_backends, strict=True):
            if connector["kv_connector"] in _MOONCAKE_CONNECTORS:
                connector.update({name: made.kv_transfer_config[name] for name in ("kv_port", "engine_id")})

    return setup_and_keep


def _lacks_npus() -> bool:
    """Return whether Ray has kinds of accelerators (2.56 and later), and none for NPUs (ray-project/ray#63617)."""
    if find_spec(_ACCELERATORS) is None:
        return False
    infer_kind = import_module(_ACCELERATORS).infer_hardware_kind_from_bundles
    return bool(infer_kind({"bundles": [{_NPU: 1}]}) == "cpu")


def _wrap(target: str, decorator: Callable[[Any], Any], remedy: str = _NAME_NPUS) -> None:
    """Wrap a private name of Ray's; where it is gone, applications that do not depend on it still work."""
    try:
        patches.wrap(target, decorator)
    except UpstreamChangedError as error:
        logger.warning("VRA-146: Ray Serve LLM of this Ray may not work as documented: %s. %s", error, remedy)


def _with_npus_as_gpus(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``upstream``, which reads a placement_group_config, such that it takes NPUs there for GPUs."""

    @functools.wraps(upstream)
    def read(placement_group_config: Mapping[str, Any] | None, *args: Any, **kwargs: Any) -> Any:
        return upstream(placement_group_config and npus_as_gpus(placement_group_config), *args, **kwargs)

    return read


def npus_as_gpus(placement_group_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the resource NPU named GPU."""
    named = dict(placement_group_config)
    if bundle := named.get("bundle_per_worker"):
        named["bundle_per_worker"] = _renamed(bundle, _NPU, _GPU)
    if bundles := named.get("bundles"):
        named["bundles"] = [_renamed(bundle, _NPU, _GPU) for bundle in bundles]
    return named


def _renamed(bundle: Mapping[str, float], old: str, new: str) -> dict[str, float]:
    if old not in bundle:
        return dict(bundle)
    others = {name: amount for name, amount in bundle.items() if name != old}
    return {**others, new: max(bundle[old], bundle.get(new, 0))}  # Ray itself adds "GPU": 0


class _SocName:
    """Equal to each name that CANN could give a chip: nodes label themselves by it, and new ones come with CANN."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and other.startswith(_SOC_PREFIX)

    def __hash__(self) -> int:
        return hash(_SOC_PREFIX)

    def __repr__(self) -> str:
        return f"{_SOC_PREFIX}..."


class _OpenMeta(EnumMeta):
    """Iterates over the members, and over one whose value stands for all names of chips."""

    def __iter__(cls) -> Iterator[Any]:
        yield from super().__iter__()
        yield _AnySoc


class _AnySoc:
    value = _SocName()


class _OpenEnum(Enum, metaclass=_OpenMeta):
    @classmethod
    def _missing_(cls, value: object) -> Any:
        return _soc_member(cls, value) if _AnySoc.value == value else None


def _soc_member(enum: type[Enum], value: Any) -> Enum:
    member = object.__new__(enum)
    member._name_ = value
    member._value_ = value
    return member


def with_soc_names(accelerator_type: type[Enum]) -> Any:
    """Return Ray's enumeration of accelerator types, with every name of an Ascend chip besides."""
    members = {name: member.value for name, member in accelerator_type.__members__.items()}
    open_enum: Any = _OpenEnum
    return open_enum(accelerator_type.__name__, members, module=accelerator_type.__module__)
