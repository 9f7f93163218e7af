"""Entry points of vLLM's plugin groups. vLLM calls them in every process, so they import nothing heavy.

Beside vllm-ascend, `platform` answers None (vLLM allows one out-of-tree platform) and sees to it that vllm-ascend's
NPUPlatform gets our members when its module is loaded. Where VLLM_PLUGINS names `ray_ascend` and not `ascend`, our
subclass of NPUPlatform is the platform, and `general` loads vllm-ascend's own general plugins, which VLLM_PLUGINS keeps
out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import ModuleType

from vllm_ray_ascend.accelerators.choose import current, unsupported
from vllm_ray_ascend.compat.ascend import keep_fence
from vllm_ray_ascend.compat.import_hook import when_imported
from vllm_ray_ascend.compat.ray_metrics import without_serve
from vllm_ray_ascend.compat.rebind import replace
from vllm_ray_ascend.compat.start_method import ADDRESS, cluster_of_parent
from vllm_ray_ascend.errors import NotActiveError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import PREFIX, VARIABLES, is_off, load, unknown

NAME = "ray_ascend"
ASCEND = "ascend"
_PLATFORM = "vllm_ray_ascend.platform.RayAscendPlatform"
_EXECUTOR_MODULE = "vllm_ray_ascend.executor.executor"
_GRAPH_EXECUTOR_MODULE = "vllm_ray_ascend.compiled_graph.executor"
_UPSTREAM_EXECUTOR_MODULE = "vllm.v1.executor.ray_executor_v2"
_ASCENDS_PIPELINES = "vllm_ascend.patch.platform.patch_pp_mtp"
_RAY_METRICS = "vllm.v1.metrics.ray_wrappers"
_ENGINE_UTILS = "vllm.v1.engine.utils"
_ENGINE_CORE = "vllm.v1.engine.core"
_ASCENDS_PATCH = "vllm_ascend.patch.platform.patch_dp_device_ids"

logger = get_logger(__name__)


def platform() -> str | None:
    """vllm.platform_plugins: the name of our platform class where it is to be the platform, else None."""
    if is_off() or not _has_vllm_ascend():
        return None
    if selected_alone():
        return _PLATFORM
    when_imported("vllm_ascend.platform", _augment)
    return None


def general() -> None:
    """vllm.general_plugins: check the switches, and make `--distributed-executor-backend ray` mean our executor.

    Raises SettingError for a bad switch. Whether VLLM_RAY_ASCEND=1 can be fulfilled shows when vLLM's executor for Ray
    is imported: only then may the platform be asked for.
    """
    _tell_vllm_our_switches()
    if is_off():
        return
    settings = load()
    if not _has_vllm_ascend() and settings.active != "1":
        return
    for name in unknown(os.environ):
        logger.warning("%s is no switch of vllm-ray-ascend; `vllm-ray-ascend env` lists those there are", name)
    if selected_alone() and _has_vllm_ascend():
        for plugin in left_out(entry_points(group="vllm.general_plugins"), os.environ):
            plugin.load()()
    join_as_parent()
    when_imported(_ASCENDS_PIPELINES, keep_fence)
    when_imported(_RAY_METRICS, without_serve)
    if settings.executor != "upstream":
        when_imported(_UPSTREAM_EXECUTOR_MODULE, _load_executor)
        when_imported(_EXECUTOR_MODULE, _select_executor)


def join_as_parent() -> None:
    """In a process whose parent has joined a cluster: let RAY_ADDRESS be that one, unless the user has set it."""
    if address := cluster_of_parent():
        os.environ.setdefault(ADDRESS, address)


def selected_alone(environ: Mapping[str, str] | None = None) -> bool:
    """Whether VLLM_PLUGINS names `ray_ascend` and not `ascend`."""
    names = (os.environ if environ is None else environ).get("VLLM_PLUGINS", "").split(",")
    return NAME in names and ASCEND not in names


def left_out(plugins: tuple[EntryPoint, ...] | list[EntryPoint], environ: Mapping[str, str]) -> list[EntryPoint]:
    """vllm-ascend's own among ``plugins`` where VLLM_PLUGINS names none of them; a choice among them is respected."""
    own = [plugin for plugin in plugins if plugin.module.partition(".")[0] == "vllm_ascend"]
    chosen = set(environ.get("VLLM_PLUGINS", "").split(","))
    return [] if any(plugin.name in chosen for plugin in own) else own


def _has_vllm_ascend() -> bool:
    return find_spec("vllm_ascend") is not None


def _augment(module: ModuleType) -> None:
    from vllm_ray_ascend.augment import augment

    augment(module.NPUPlatform)


def _load_executor(_: ModuleType) -> None:
    """Import our executor, whose own hook then selects it. Half imported, it is what imports upstream's just now."""
    from vllm_ray_ascend.augment import platform_is_ours

    if platform_is_ours():
        import_module(_EXECUTOR_MODULE)
    elif load().active == "1":
        from vllm.platforms import current_platform

        raise NotActiveError(f"{PREFIX}=1 asks for vllm-ray-ascend, but {unsupported(current_platform)}")


def _select_executor(module: ModuleType) -> None:
    """Let the name RayExecutorV2 mean our executor, and arrange the like for data parallelism over Ray.

    Users say "ray", and vLLM's config and vllm-ascend's NPUWorker compare that very string, so a class or a qualified
    name in its place misses their code for Ray. Executor.get_class looks the name up in its module at each call, in
    vLLM 0.23 to 0.33. Removable when vLLM has a registry of executors.
    """
    chosen = module.RayAscendExecutor
    if load().executor == "compiled_graph":
        chosen = import_module(_GRAPH_EXECUTOR_MODULE).CompiledGraphExecutor
    replace(import_module(_UPSTREAM_EXECUTOR_MODULE), "RayExecutorV2", chosen)
    when_imported(_ENGINE_UTILS, _select_manager)
    when_imported(_ENGINE_CORE, _select_actors)
    when_imported(_ASCENDS_PATCH, _select_device_ids)


def _select_manager(module: ModuleType) -> None:
    from vllm_ray_ascend.engine.ending import grant_time, leave_no_sockets
    from vllm_ray_ascend.engine.manager import RayAscendEngineActorManager

    replace(module, "CoreEngineActorManager", RayAscendEngineActorManager)
    grant_time(module)
    leave_no_sockets(module)
    _select_device_ids(module)


def _select_actors(module: ModuleType) -> None:
    from vllm_ray_ascend.engine import actors

    replace(module, "EngineCoreActor", actors.RayAscendEngineCoreActor)
    replace(module, "DPMoEEngineCoreActor", actors.RayAscendDPMoEEngineCoreActor)
    _select_device_ids(module)


def _select_device_ids(_: ModuleType) -> None:
    """Put ours over vLLM's and over vllm-ascend's patch, which wraps round and comes too late for Ray's actors."""
    from vllm_ray_ascend.engine.device_ids import select

    select([sys.modules[name] for name in (_ENGINE_UTILS, _ENGINE_CORE) if name in sys.modules], current().kind)


def _tell_vllm_our_switches() -> None:
    """vLLM warns about VLLM_* variables that it does not know, or refuses them."""
    ours = [name for name in VARIABLES if name in os.environ]
    if not ours:
        return
    from vllm import envs

    for name in ours:
        envs.environment_variables.setdefault(name, lambda name=name: os.environ.get(name))
