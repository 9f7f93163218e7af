"""Entry points of vLLM's plugin groups. vLLM calls them in every process, so they import nothing heavy.

Beside vllm-ascend, `platform` answers None (vLLM allows one out-of-tree platform) and arranges that vllm-ascend's
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

from vllm_ray_ascend import patches
from vllm_ray_ascend.accelerators.choose import current_accelerator, unsupported_platform_message
from vllm_ray_ascend.compat import ray_llm
from vllm_ray_ascend.compat.ascend import block_reschedule_until_token
from vllm_ray_ascend.compat.import_hook import when_imported
from vllm_ray_ascend.compat.ray_metrics import allow_without_serve
from vllm_ray_ascend.compat.start_method import RAY_ADDRESS, parent_cluster_address
from vllm_ray_ascend.errors import NotActiveError
from vllm_ray_ascend.log import get_logger
from vllm_ray_ascend.settings import PREFIX, VARIABLES, is_off, load, unknown_variables

NAME = "ray_ascend"
ASCEND = "ascend"
_PLATFORM = "vllm_ray_ascend.platform.RayAscendPlatform"
_EXECUTOR_MODULE = "vllm_ray_ascend.executor.executor"
_GRAPH_EXECUTOR_MODULE = "vllm_ray_ascend.compiled_graph.executor"
_UPSTREAM_EXECUTOR_MODULE = "vllm.v1.executor.ray_executor_v2"
_ASCEND_PIPELINE_PATCH = "vllm_ascend.patch.platform.patch_pp_mtp"
_ASCEND_DEVICE_IDS_PATCH = "vllm_ascend.patch.platform.patch_dp_device_ids"
_RAY_METRICS = "vllm.v1.metrics.ray_wrappers"
_WEIGHT_TRANSFER = "vllm.distributed.weight_transfer.factory"
_ENGINE_ARGS = "vllm.engine.arg_utils"
_ENGINE_UTILS = "vllm.v1.engine.utils"
_ENGINE_CORE = "vllm.v1.engine.core"
_CORE_CLIENT = "vllm.v1.engine.core_client"
_SCALING_ROUTE = "vllm.entrypoints.serve.elastic_ep.api_router"
_ENGINE_CLIENT = "vllm.v1.engine.async_llm"
_SERVERS = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
_SERVER_SUPERVISORS = ("vllm.entrypoints.launchers.dp_supervisor", "vllm.entrypoints.openai.dp_supervisor")

logger = get_logger(__name__)


def platform() -> str | None:
    """Return the name of our platform class where it is to be the platform, else None (vllm.platform_plugins)."""
    if is_off() or not _has_vllm_ascend():
        return None
    for name, callback in ray_llm.hooks(_is_npu).items():
        when_imported(name, callback)
    if is_sole_platform_plugin():
        return _PLATFORM
    when_imported("vllm_ascend.platform", _patch_platform)
    return None


def general() -> None:
    """Check the switches, and make `--distributed-executor-backend ray` mean our executor (vllm.general_plugins).

    Raises SettingError for a bad switch. Whether VLLM_RAY_ASCEND=1 can be fulfilled shows when vLLM's executor for Ray
    is imported: only then may the platform be asked for.
    """
    _register_switches_with_vllm()
    if is_off():
        return
    settings = load()
    if not _has_vllm_ascend() and settings.active != "1":
        return
    for name in unknown_variables(os.environ):
        logger.warning("VRA-107: %s is no switch of vllm-ray-ascend; `vllm-ray-ascend env` lists them", name)
    if is_sole_platform_plugin() and _has_vllm_ascend():
        for plugin in skipped_ascend_plugins(entry_points(group="vllm.general_plugins"), os.environ):
            plugin.load()()
    join_parent_cluster()
    when_imported(_ASCEND_PIPELINE_PATCH, block_reschedule_until_token)
    when_imported(_RAY_METRICS, allow_without_serve)
    when_imported(_WEIGHT_TRANSFER, _register_weights_backend)
    for name in _SERVERS:
        when_imported(name, _set_exit_code)
    for name in _SERVER_SUPERVISORS:
        when_imported(name, _set_exit_code_of_supervisor)
    if settings.elastic_ep == "1":
        when_imported(_CORE_CLIENT, _guard_scaling)
        when_imported(_ENGINE_CLIENT, _guard_frontend)
        when_imported(_SCALING_ROUTE, _explain_scaling)
    if settings.executor != "upstream":
        for name in _SERVER_SUPERVISORS:
            when_imported(name, _leave_devices_to_ray)
        when_imported(_ENGINE_ARGS, _complete_configs)
        when_imported(_ENGINE_CLIENT, _check_adapters)
        when_imported(_CORE_CLIENT, _end_waits)
        if settings.recover == "1":
            when_imported(_CORE_CLIENT, _continue_without_ranks)
            when_imported(_ENGINE_CLIENT, _report_failures)
        if settings.metrics == "on":
            when_imported(_CORE_CLIENT, _receive_metrics)
        when_imported(_UPSTREAM_EXECUTOR_MODULE, _load_executor)
        when_imported(_EXECUTOR_MODULE, _select_executor)


def join_parent_cluster() -> None:
    """Set RAY_ADDRESS to the cluster that the parent process has joined, unless the user has set it."""
    if address := parent_cluster_address():
        os.environ.setdefault(RAY_ADDRESS, address)


def is_sole_platform_plugin(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether VLLM_PLUGINS names `ray_ascend` and not `ascend`."""
    names = (os.environ if environ is None else environ).get("VLLM_PLUGINS", "").split(",")
    return NAME in names and ASCEND not in names


def skipped_ascend_plugins(
    plugins: tuple[EntryPoint, ...] | list[EntryPoint], environ: Mapping[str, str]
) -> list[EntryPoint]:
    """Return vllm-ascend's own among ``plugins``; none where VLLM_PLUGINS names some of them, which is respected."""
    own = [plugin for plugin in plugins if plugin.module.partition(".")[0] == "vllm_ascend"]
    chosen = set(environ.get("VLLM_PLUGINS", "").split(","))
    return [] if any(plugin.name in chosen for plugin in own) else own


def _has_vllm_ascend() -> bool:
    return find_spec("vllm_ascend") is not None


def _is_npu() -> bool:
    from vllm_ray_ascend.platform_patch import is_npu

    return is_npu()


def _patch_platform(module: ModuleType) -> None:
    from vllm_ray_ascend.platform_patch import patch_platform

    patch_platform(module.NPUPlatform)


def _load_executor(_: ModuleType) -> None:
    """Import our executor, whose own hook then selects it, unless it is what imports upstream's just now."""
    from vllm_ray_ascend.platform_patch import platform_is_ours

    if platform_is_ours():
        import_module(_EXECUTOR_MODULE)
    elif load().active == "1":
        from vllm.platforms import current_platform

        reason = unsupported_platform_message(current_platform)
        raise NotActiveError("VRA-108", f"{PREFIX}=1 asks for vllm-ray-ascend, but {reason}")


def _select_executor(module: ModuleType) -> None:
    """Let the name RayExecutorV2 mean our executor, and arrange the like for data parallelism over Ray.

    Executor.get_class looks the name up in its module at each call, in vLLM 0.23 to 0.33.
    """
    chosen = module.RayAscendExecutor
    if load().executor == "compiled_graph":
        chosen = import_module(_GRAPH_EXECUTOR_MODULE).CompiledGraphExecutor
    patches.apply("vllm.v1.executor.ray_executor_v2.RayExecutorV2", chosen)
    when_imported(_ENGINE_UTILS, _patch_engine_utils)
    when_imported(_ENGINE_CORE, _patch_engine_core)
    when_imported(_ASCEND_DEVICE_IDS_PATCH, _select_device_ids)


def _complete_configs(_: ModuleType) -> None:
    """Check an engine's command line, and complete what it leaves open for data parallelism over Ray."""
    from vllm_ray_ascend.engine.engine_args import complete_configs
    from vllm_ray_ascend.platform_patch import platform_is_ours

    complete_configs(platform_is_ours)


def _check_adapters(_: ModuleType) -> None:
    """Let API servers ask workers for the files of adapters."""
    from vllm_ray_ascend.engine.adapters import check_before_requests
    from vllm_ray_ascend.platform_patch import workers_are_ours

    check_before_requests(workers_are_ours)


def _end_waits(_: ModuleType) -> None:
    from vllm_ray_ascend.engine.shutdown import end_waits_for_engine_core

    end_waits_for_engine_core()


def _receive_metrics(_: ModuleType) -> None:
    """Let this process show the metrics of its engines with vLLM's own."""
    from vllm_ray_ascend.engine.metrics import receive_values

    receive_values()


def _continue_without_ranks(_: ModuleType) -> None:
    """Let clients serve while data parallel ranks are down."""
    from vllm_ray_ascend.engine.rank_client import install

    install()


def _report_failures(_: ModuleType) -> None:
    from vllm_ray_ascend.engine.rank_client import report_failed_requests, report_health

    report_health()
    report_failed_requests()


def _patch_engine_utils(module: ModuleType) -> None:
    from vllm_ray_ascend.engine.manager import RayAscendEngineActorManager
    from vllm_ray_ascend.engine.shutdown import extend_shutdown_timeout, remove_ipc_sockets

    patches.apply("vllm.v1.engine.utils.CoreEngineActorManager", RayAscendEngineActorManager)
    extend_shutdown_timeout(module)
    remove_ipc_sockets()
    _select_device_ids(module)


def _patch_engine_core(module: ModuleType) -> None:
    from vllm_ray_ascend.engine import actors
    from vllm_ray_ascend.engine.shutdown import record_server_sockets

    record_server_sockets()
    patches.apply("vllm.v1.engine.core.EngineCoreActor", actors.RayAscendEngineCoreActor)
    patches.apply("vllm.v1.engine.core.DPMoEEngineCoreActor", actors.RayAscendDPMoEEngineCoreActor)
    _select_device_ids(module)


def _register_weights_backend(_: ModuleType) -> None:
    """Offer our transport for new weights, where trainers have the interface that it knows (vLLM 0.29 to 0.32)."""
    from vllm.distributed.weight_transfer import base

    from vllm_ray_ascend.ray_transport.direct import register_weights_backend

    if hasattr(getattr(base, "WeightSource", None), "held_names"):
        register_weights_backend()


def _guard_scaling(_: ModuleType) -> None:
    from vllm_ray_ascend.engine.elastic_client import install

    install()


def _guard_frontend(module: ModuleType) -> None:
    from vllm_ray_ascend.engine.elastic_client import guard_frontend

    guard_frontend(module)


def _explain_scaling(module: ModuleType) -> None:
    from vllm_ray_ascend.engine.elastic_client import explain_failures

    explain_failures(module)


def _set_exit_code(module: ModuleType) -> None:
    from vllm_ray_ascend.engine.exit_code import exit_nonzero_after_failure

    exit_nonzero_after_failure(module)


def _set_exit_code_of_supervisor(module: ModuleType) -> None:
    from vllm_ray_ascend.engine.exit_code import exit_nonzero_unless_stopped

    exit_nonzero_unless_stopped(module)


def _leave_devices_to_ray(module: ModuleType) -> None:
    from vllm_ray_ascend.engine.device_ids import leave_devices_to_ray

    leave_devices_to_ray(module)


def _select_device_ids(_: ModuleType) -> None:
    """Put ours over vLLM's and over vllm-ascend's patch, which wraps around and comes too late for Ray's actors."""
    from vllm_ray_ascend.engine.device_ids import replace_functions

    replace_functions(
        [sys.modules[name] for name in (_ENGINE_UTILS, _ENGINE_CORE) if name in sys.modules], current_accelerator().kind
    )


def _register_switches_with_vllm() -> None:
    """Make our switches known to vLLM, which warns about VLLM_* variables that it does not know, or refuses them."""
    if ours := [name for name in VARIABLES if name in os.environ]:
        getters = {name: lambda name=name: os.environ.get(name) for name in ours}
        patches.add_entries("vllm.envs.environment_variables", getters)
