"""Every upstream name that this plugin replaces, wraps or adds to: one table, and the only functions that apply it.

The replacements themselves stand where their subject is (engine/device_ids.py, ...); they hand them to `apply`, `wrap`,
`add_entries` or `with_globals` together with the name of the target, which has to be in `PATCHES`. To add a patch of
upstream, add a row and call one of these functions; ci/contract checks the row against every supported release, and
`vllm-ray-ascend env --patches` shows it. Imports nothing but errors and log, so that every folder may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from types import CellType, CodeType, FunctionType
from typing import Any, Literal, NamedTuple

from vllm_ray_ascend.errors import UpstreamChangedError
from vllm_ray_ascend.log import get_logger

logger = get_logger(__name__)

Kind = Literal["replace", "subclass", "wrap", "add", "rebind"]
KINDS: Mapping[Kind, str] = {
    "replace": "our object is found under the name",
    "subclass": "our subclass of what was there is found under the name",
    "wrap": "our function runs around what was there",
    "add": "the name, or entries of it, are added",
    "rebind": "one function reads our object instead of its module's global, for one call",
}


class Patch(NamedTuple):
    """One row: names of one upstream module that are patched for the same reason."""

    module: str
    names: tuple[str, ...]
    """``Class.attribute`` or ``attribute``; of a rebind, ``function:GLOBAL``, the global as that function reads it."""
    kind: Kind
    by: str
    """Our file, within vllm_ray_ascend/, that makes the replacement."""
    what: str
    why: str
    """The symptom without it, and upstream's issue where there is one."""
    releases: str
    """Which releases have the names: a project, and versions (PEP 440) where not all supported ones have them."""
    removable: str
    """When the row can go."""
    applied: str
    """When, and in which processes."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The full names."""
        return tuple(f"{self.module}.{name}" for name in self.names)


_PLATFORM_LOAD = "import of the module, in every process that asks for vLLM's platform"
_PLUGIN_LOAD = "plugin load, in every process of vLLM"
_EXECUTOR = "import of vLLM's Ray executor, in the driver and the engine core"
_ENGINE_UTILS = "import of vllm.v1.engine.utils, in the driver and the engine core"
_ENGINE_CORE = "import of vllm.v1.engine.core, in the driver and the engine core"
_SERVER = "import of vLLM's API server, in its process"
_SERVER_SUPERVISOR = "plugin load, in the process of `vllm serve --data-parallel-multi-port-external-lb`"
_EXECUTOR_START = "start of the executor"
_WORKER_START = "start of a worker"
_ELASTIC_SERVER = "plugin load with VLLM_RAY_ASCEND_ELASTIC_EP=1, in the API server"
_RECOVERING_SERVER = "plugin load with VLLM_RAY_ASCEND_RECOVER=1, in the API server"
_ELASTIC_WORKER = "start of a worker with VLLM_RAY_ASCEND_ELASTIC_EP=1 and --enable-elastic-ep"
_GRAPH_START = "start of an engine with VLLM_RAY_ASCEND_EXECUTOR=compiled_graph"
_RAY_REGISTER = "vllm_ray_ascend.ray_transport.register(), in the driver of a compiled graph"
_RAY_ACTOR = "import of our communicator, in every actor of a compiled graph"

_NO_REGISTRY = "vLLM has a registry of executors and of engine core managers"
_RAY_KNOWS_NPUS = "Ray has a kind of accelerator for NPUs (ray #63617): patches/ray/0004"
_NEVER = "never: it is what the plugin is for"

PATCHES: tuple[Patch, ...] = (
    # ---- vLLM: switches and platform ----
    Patch(
        "vllm.envs",
        ("environment_variables",),
        kind="add",
        by="plugin.py",
        what="the VLLM_RAY_ASCEND_* variables that are set",
        why="vLLM warns of VLLM_* variables that it does not know, or refuses them",
        releases="vllm",
        removable="vLLM lets plugins declare variables",
        applied=_PLUGIN_LOAD,
    ),
    Patch(
        "vllm_ascend.platform",
        (
            "NPUPlatform.ray_device_key",
            "NPUPlatform.device_control_env_var",
            "NPUPlatform.ray_noset_device_env_vars",
        ),
        kind="replace",
        by="platform_patch.py",
        what="what Ray calls an NPU, and how it hides NPUs: the same as vllm-ascend 0.23 and later say",
        why="a worker that believes anything else runs on a wrong NPU",
        releases="vllm-ascend",
        removable="vllm-ascend promises these values",
        applied="import of vllm_ascend.platform, in every process",
    ),
    Patch(
        "vllm_ascend.platform",
        ("NPUPlatform.check_and_update_config",),
        kind="wrap",
        by="platform_patch.py",
        what="checks an engine over Ray: Ray's version, and that its process is spawned where Ray was joined",
        why="an old Ray fails late and unclearly; a forked engine process hangs at its first call to Ray",
        releases="vllm-ascend",
        removable="vLLM spawns the engine wherever the process has joined Ray",
        applied="import of vllm_ascend.platform, in every process",
    ),
    Patch(
        "vllm_ascend.platform",
        ("NPUPlatform._vllm_ray_ascend",),
        kind="add",
        by="platform_patch.py",
        what="our version: marks a platform class as patched",
        why="workers refuse to start on a node whose platform lacks our members",
        releases="vllm-ascend",
        removable=_NEVER,
        applied="import of vllm_ascend.platform, in every process",
    ),
    Patch(
        "vllm.platforms.interface",
        ("Platform.logical_device_id_to_visible_device_id",),
        kind="replace",
        by="platform_patch.py",
        what="on the NPU platform only: the same number, or an error that names the list and the remedy",
        why="upstream's error does not say which list lacks which NPU",
        releases="vllm >=0.24",
        removable="vLLM's error names the variable and the node",
        applied="import of vllm_ascend.platform, in every process",
    ),
    Patch(
        "vllm.v1.metrics.ray_wrappers",
        ("ray_metrics", "Metric"),
        kind="add",
        by="compat/ray_metrics.py",
        what="Ray's metrics, where only Ray Serve is missing",
        why='without ray[serve] vLLM refuses its Ray metrics: "RayPrometheusMetric requires Ray to be installed"',
        releases="vllm",
        removable="vLLM imports Ray Serve apart from Ray's metrics: patches/vllm/0007",
        applied="import of vllm.v1.metrics.ray_wrappers",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler",
        ("Scheduler.update_from_output",),
        kind="wrap",
        by="compat/ascend.py",
        what="a request stays unscheduled until the token in flight is there, along with vllm-ascend's patch_pp_mtp",
        why="with pipeline parallelism a prompt longer than a batch is decoded twice simultaneously: its text is wrong",
        releases="vllm; vllm-ascend >=0.24.0rc1",
        removable="vllm-ascend asks for placeholders itself: patches/vllm-ascend/0002",
        applied="import of vllm_ascend.patch.platform.patch_pp_mtp, in the engine core",
    ),
    # ---- vLLM: the executor ----
    Patch(
        "vllm.v1.executor.abstract",
        ("Executor.get_class",),
        kind="wrap",
        by="compat/ray_llm.py",
        what="vLLM's general plugins are loaded before an executor is chosen",
        why="an engine whose configuration was made in another process, as in Ray Serve LLM, has vLLM's own executor",
        releases="vllm",
        removable="vLLM loads general plugins there: patches/ray/0004 does so in Ray Serve LLM",
        applied=_PLATFORM_LOAD,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2",),
        kind="subclass",
        by="plugin.py",
        what="RayAscendExecutor, or CompiledGraphExecutor, is what `--distributed-executor-backend ray` selects",
        why=(
            "vLLM's config and vllm-ascend's NPUWorker compare the literal \"ray\": a class or a qualified name "
            "in its place misses their code for Ray"
        ),
        releases="vllm",
        removable=_NO_REGISTRY,
        applied=_EXECUTOR,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2._init_executor:RayWorkerProc",),
        kind="rebind",
        by="executor/executor.py",
        what="our worker class, on top of whatever class stands under the name RayWorkerProc",
        why="upstream's worker is killed, has the driver's network variables, and reports nothing before HCCL gives up",
        releases="vllm",
        removable="RayExecutorV2 has a hook for its worker class",
        applied=_EXECUTOR_START,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2._init_executor:ray",),
        kind="rebind",
        by="executor/executor.py",
        what="StartupRayProxy: `get` has limits and ends with the first failure; actors get the control address",
        why="a start in which one rank fails waits for the others, up to HCCL's 1836 s",
        releases="vllm",
        removable="RayExecutorV2 limits its start",
        applied=_EXECUTOR_START,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2._init_executor:WORKER_SPECIFIC_ENV_VARS",),
        kind="rebind",
        by="executor/executor.py",
        what="with the variables that belong to a node, such as ASCEND_RT_VISIBLE_DEVICES and HCCL_IF_IP",
        why="a remote node gets the driver's device list and address (vllm-ascend #2879, #168)",
        releases="vllm",
        removable="vLLM keeps every platform's variables on their node: patches/vllm/0001",
        applied=_EXECUTOR_START,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2._init_executor:initialize_ray_cluster",),
        kind="rebind",
        by="executor/executor.py",
        what="vLLM's, after our checks of the cluster and with our placement group",
        why="vLLM waits for a placement group that is not available, and keeps it after the engine's end",
        releases="vllm",
        removable="vLLM checks and places by the platform's resource",
        applied=_EXECUTOR_START,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2._init_executor:get_bundles_sorted_by_node",),
        kind="rebind",
        by="executor/executor.py",
        what="as many bundles as there are ranks, in an order that keeps tensor parallel groups whole on a node",
        why="in a larger user-made placement group vLLM's message queue waits for a reader in each bundle, permanently",
        releases="vllm",
        removable="vLLM counts ranks, not bundles",
        applied=_EXECUTOR_START,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2._init_executor:get_bundles_for_indices",),
        kind="rebind",
        by="executor/executor.py",
        what="vLLM's, whose answer we read: which ranks are on the driver's node",
        why="vLLM takes the first ranks for those of the driver's node: with VLLM_RAY_BUNDLE_INDICES=2,3,0,1 the start "
        "hangs",
        releases="vllm",
        removable="vLLM gives its message queue the ranks of the driver's node",
        applied=_EXECUTOR_START,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2._init_executor:build_actor_name",),
        kind="rebind",
        by="executor/executor.py",
        what="names of actors that are unique among data parallel engines and restarts",
        why="two engines in one Ray namespace: the actors of the second are refused, as their names are taken",
        releases="vllm",
        removable="vLLM's names have the data parallel rank",
        applied=_EXECUTOR_START,
    ),
    Patch(
        "vllm.v1.executor.ray_executor_v2",
        ("RayExecutorV2._init_executor:MessageQueue", "RayWorkerProc._init_message_queues:MessageQueue"),
        kind="rebind",
        by="ipc/message_queue.py",
        what="CancellableQueue: reads and writes that another thread and limits can end, TCP of our own between nodes",
        why="a request whose worker died on another node hangs for 300 s; ZeroMQ's threads are slow between nodes",
        releases="vllm",
        removable="vLLM can end a read of its queue, over TCP too",
        applied="start of the executor, and start of a worker",
    ),
    Patch(
        "vllm.v1.executor.multiproc_executor",
        ("WorkerWrapperBase",),
        kind="subclass",
        by="executor/worker.py",
        what="a wrapper that reports which long part of its start a worker begins; its steps report their failures",
        why="a start that is late cannot say what each rank does",
        releases="vllm",
        removable="vLLM's worker reports its progress",
        applied=_WORKER_START,
    ),
    Patch(
        "vllm_ascend.worker.worker",
        ("MemorySnapshot",),
        kind="wrap",
        by="executor/memory_wait.py",
        what="a worker that starts waits a while for device memory that is not free yet",
        why='a restart fails with "Free memory on device ...": the device still holds the memory of the old workers',
        releases="vllm-ascend",
        removable="vllm-ascend waits before it gives up",
        applied=_WORKER_START,
    ),
    Patch(
        "vllm.v1.worker.gpu_worker",
        ("MemorySnapshot",),
        kind="wrap",
        by="executor/memory_wait.py",
        what="the same on GPUs",
        why="as there",
        releases="vllm",
        removable="vLLM waits before it gives up",
        applied=_WORKER_START,
    ),
    Patch(
        "vllm.distributed.device_communicators.shm_broadcast",
        ("MessageQueue.wait_until_ready",),
        kind="wrap",
        by="ipc/message_queue.py",
        what="the name of a queue's shared memory is removed once all ends have it open",
        why="a process that is killed leaves psm_* files in /dev/shm",
        releases="vllm",
        removable="vLLM removes the name itself",
        applied=_WORKER_START,
    ),
    Patch(
        "vllm.distributed.device_communicators.shm_broadcast",
        ("ShmRingBuffer.__init__",),
        kind="wrap",
        by="ipc/message_queue.py",
        what="a worker records which shared memory its queues have, to remove the names when it is ended immediately",
        why="segments of a user's own code that the worker has mapped must stay",
        releases="vllm",
        removable="vLLM removes the name itself",
        applied=_WORKER_START,
    ),
    # ---- vLLM: engine cores ----
    Patch(
        "vllm.engine.arg_utils",
        ("EngineArgs.create_engine_config", "get_model_path"),
        kind="wrap",
        by="engine/engine_args.py",
        what=(
            "a model's path that does not exist is refused; data parallelism over Ray: the ranks meet at Ray's address "
            "of this node, which takes as many as fit"
        ),
        why=(
            "vLLM takes the default route's address, which Ray may not know (vllm #43095), binds no socket to a name, "
            "and wants all ranks on this node unless --data-parallel-size-local is given. A path that does not exist "
            "is a name on a hub to it"
        ),
        releases="vllm",
        removable="vLLM asks Ray for its address, and for what fits",
        applied=_PLUGIN_LOAD,
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("CoreEngineActorManager",),
        kind="subclass",
        by="engine/manager.py",
        what="places data parallel ranks by NPUs, node by node; ends engine cores gracefully",
        why="upstream counts GPUs, wraps local ranks around, and kills engine cores immediately",
        releases="vllm",
        removable=_NO_REGISTRY,
        applied=_ENGINE_UTILS,
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("CoreEngineActorManager.__init__:CoreEngineActorManager",),
        kind="rebind",
        by="engine/manager.py",
        what="our create_dp_placement_groups, which upstream calls as a static method of its own class",
        why="a subclass cannot override it",
        releases="vllm",
        removable="vLLM calls it on self",
        applied="start of data parallelism over Ray",
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("CoreEngineActorManager.__init__:get_env_vars_to_copy",),
        kind="rebind",
        by="engine/manager.py",
        what="which variables engine core actors get: the NPU stack's that travel, none of the node, no secrets",
        why="HCCL_BUFFSIZE and the like are lost on the way to other nodes; Ray writes secrets to its logs",
        releases="vllm",
        removable="vLLM copies the platform's variables: patches/vllm/0006",
        applied="start of data parallelism over Ray",
    ),
    Patch(
        "vllm.v1.engine.core",
        ("EngineCoreActor", "DPMoEEngineCoreActor"),
        kind="subclass",
        by="engine/actors.py",
        what="engine core actors that derive their node's variables, guess no NPUs and end gracefully",
        why=(
            'upstream guesses [local rank x world size, ...): "local range: [8, 12)" (vllm-ascend #2879), or another '
            "tenant's NPUs"
        ),
        releases="vllm",
        removable="vLLM guesses no devices over Ray: patches/vllm/0002",
        applied=_ENGINE_CORE,
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("set_assigned_physical_gpu_ids_for_dp_rank", "get_physical_gpu_ids_for_local_dp_rank"),
        kind="replace",
        by="engine/device_ids.py",
        what="over Ray nothing is assigned; elsewhere a rank's NPUs never wrap around to another rank's",
        why=(
            'vLLM fails with `local range: [8, 12) base value "0,1,2,3,4,5,6,7"`, vllm-ascend\'s patch gives two ranks '
            "the same NPUs (vllm-ascend #2879)"
        ),
        releases="vllm >=0.24",
        removable="vLLM assigns nothing over Ray, and vllm-ascend's patch_dp_device_ids is gone",
        applied=f"{_ENGINE_UTILS}; again at import of vllm_ascend.patch.platform.patch_dp_device_ids",
    ),
    Patch(
        "vllm.v1.engine.core",
        ("get_physical_gpu_ids_for_local_dp_rank",),
        kind="replace",
        by="engine/device_ids.py",
        what="as in vllm.v1.engine.utils: vllm-ascend's patch does not reach the name here",
        why="as there; patches/vllm-ascend/0001",
        releases="vllm >=0.24",
        removable="as there",
        applied=f"{_ENGINE_CORE}; again at import of vllm_ascend.patch.platform.patch_dp_device_ids",
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("set_device_control_env_var",),
        kind="replace",
        by="engine/device_ids.py",
        what="over Ray no device list is written into the environment",
        why="vLLM 0.23 writes a guess there, which workers inherit",
        releases="vllm <0.24",
        removable="vLLM 0.23 is no longer supported",
        applied=_ENGINE_UTILS,
    ),
    Patch(
        "vllm.entrypoints.launchers.api_server.entry",
        ("serve_http",),
        kind="wrap",
        by="engine/exit_code.py",
        what="a server over Ray whose engine failed exits with code 1",
        why="its exit code is 0, which systemd, Kubernetes and RayJob take for success",
        releases="vllm >=0.29",
        removable="vLLM's server fails where its engine did",
        applied=_SERVER,
    ),
    Patch(
        "vllm.entrypoints.openai.api_server",
        ("serve_http",),
        kind="wrap",
        by="engine/exit_code.py",
        what="as in vllm.entrypoints.launchers.api_server.entry",
        why="as there",
        releases="vllm <0.29",
        removable="as there",
        applied=_SERVER,
    ),
    Patch(
        "vllm.entrypoints.launchers.dp_supervisor",
        ("DPSupervisor._handle_signal", "DPSupervisor.run"),
        kind="wrap",
        by="engine/exit_code.py",
        what="the supervisor of data parallel servers over Ray exits with code 1, unless a signal has ended it",
        why="its exit code is 0 whatever has ended its servers",
        releases="vllm >=0.29",
        removable="vLLM's supervisor fails where a server did",
        applied=_SERVER_SUPERVISOR,
    ),
    Patch(
        "vllm.entrypoints.openai.dp_supervisor",
        ("DPSupervisor._handle_signal", "DPSupervisor.run"),
        kind="wrap",
        by="engine/exit_code.py",
        what="as in vllm.entrypoints.launchers.dp_supervisor",
        why="as there",
        releases="vllm <0.29",
        removable="as there",
        applied=_SERVER_SUPERVISOR,
    ),
    Patch(
        "vllm.entrypoints.launchers.dp_supervisor",
        ("_build_device_ids",),
        kind="wrap",
        by="engine/device_ids.py",
        what="the supervisor of data parallel servers gives those over Ray no --device-ids of its own",
        why="Ray assigns devices; our executor refuses --device-ids, which cannot choose them (VRA-302)",
        releases="vllm >=0.29",
        removable="vLLM's supervisor gives servers over Ray no --device-ids",
        applied=_SERVER_SUPERVISOR,
    ),
    Patch(
        "vllm.entrypoints.openai.dp_supervisor",
        ("_build_device_ids",),
        kind="wrap",
        by="engine/device_ids.py",
        what="as in vllm.entrypoints.launchers.dp_supervisor",
        why="as there",
        releases="vllm >=0.24,<0.29",
        removable="as there",
        applied=_SERVER_SUPERVISOR,
    ),
    Patch(
        "vllm.v1.engine.async_llm",
        ("AsyncLLM.shutdown",),
        kind="wrap",
        by="engine/exit_code.py",
        what="records whether the engine had failed before it was shut down",
        why="as there; afterwards every engine counts as dead",
        releases="vllm",
        removable="as there",
        applied=_SERVER,
    ),
    Patch(
        "vllm.v1.engine.async_llm",
        ("AsyncLLM.add_lora", "AsyncLLM.add_request"),
        kind="wrap",
        by="engine/adapters.py",
        what="over Ray a request whose LoRA adapter would have to be read again, and cannot be, is answered with 404",
        why="a worker reads it in a step, whose failure ends the engine and all requests with it",
        releases="vllm",
        removable="vLLM ends a request alone whose adapter cannot be loaded",
        applied="import of vllm.v1.engine.async_llm, in the API server",
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("get_engine_process_shutdown_timeout",),
        kind="wrap",
        by="engine/shutdown.py",
        what="an engine core process gets the time that an orderly end takes with its number of ranks",
        why="vLLM waits no time at all: workers are never asked to stop, HCCL's connections end with their processes",
        releases="vllm >=0.29",
        removable="vLLM waits on every platform as it does on ROCm",
        applied=_ENGINE_UTILS,
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("CoreEngineProcManager.__init__",),
        kind="wrap",
        by="engine/shutdown.py",
        what="records the number of ranks, for that time; only where vLLM has the function above",
        why="the function does not receive the engine core that it is asked about",
        releases="vllm",
        removable="as there",
        applied=_ENGINE_UTILS,
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("get_open_zmq_ipc_path",),
        kind="wrap",
        by="engine/shutdown.py",
        what="files of sockets between server and engine cores are removed when the process that named them exits",
        why="pyzmq 27 leaves a socket's file behind however it is closed",
        releases="vllm",
        removable="vLLM or ZeroMQ removes them",
        applied=_ENGINE_UTILS,
    ),
    Patch(
        "vllm.v1.utils",
        ("get_open_zmq_ipc_path",),
        kind="wrap",
        by="engine/shutdown.py",
        what="as in vllm.v1.engine.utils",
        why="as there",
        releases="vllm",
        removable="as there",
        applied=_ENGINE_UTILS,
    ),
    Patch(
        "vllm.v1.engine.utils",
        ("wait_for_engine_startup",),
        kind="wrap",
        by="engine/shutdown.py",
        what="the file of the handshake's socket is removed once all engine cores have started",
        why="an engine core whose server is killed no longer knows it, and it stays in /tmp",
        releases="vllm",
        removable="as there",
        applied=_ENGINE_UTILS,
    ),
    Patch(
        "vllm.v1.engine.core",
        ("make_zmq_socket",),
        kind="wrap",
        by="engine/shutdown.py",
        what="an engine core removes the files of the sockets to its server where that was killed",
        why="they stay in /tmp, of each server, or replica of Ray Serve, that was killed",
        releases="vllm",
        removable="as there",
        applied="import of vllm.v1.engine.core",
    ),
    Patch(
        "vllm.v1.engine.core",
        (
            "EngineCore.step",
            "EngineCore.step_with_batch_queue",
            "EngineCore.post_step",
            "EngineCoreProc._handle_client_request",
        ),
        kind="wrap",
        by="engine/recovery.py",
        what="with VLLM_RAY_ASCEND_RECOVER=1 a failed step or executor restarts the workers",
        why="vLLM's engine core ends with its first dead worker",
        releases="vllm",
        removable="vLLM's engine core can restart its executor",
        applied="start of the executor with VLLM_RAY_ASCEND_RECOVER=1",
    ),
    # ---- vLLM: metrics ----
    Patch(
        "vllm.v1.engine.core",
        ("EngineCoreProc.process_output_sockets",),
        kind="wrap",
        by="engine/metrics.py",
        what="the engine core also sends the plugin's metrics, every 5 s and after each event",
        why="they arise in the engine core's process, and vLLM's way for its own (SchedulerStats) has a fixed form",
        releases="vllm",
        removable="vLLM lets plugins add statistics to those of its scheduler",
        applied="start of the executor, unless VLLM_RAY_ASCEND_METRICS=off",
    ),
    Patch(
        "vllm.v1.engine.core_client",
        ("MPClient.shutdown",),
        kind="wrap",
        by="engine/shutdown.py",
        what="whoever waits for an engine core that has died gets EngineDeadError",
        why="`LLM.generate` and calls that wait for a result hang for ever",
        releases="vllm",
        removable="vLLM's clients end such waits",
        applied="import of vLLM's engine client, in API servers and processes of LLM",
    ),
    Patch(
        "vllm.v1.engine.core_client",
        ("BackgroundResources.validate_alive",),
        kind="wrap",
        by="engine/shutdown.py",
        what="files of a client's sockets are removed when an engine core says that it dies",
        why="a replica of Ray Serve is killed then, and leaves them",
        releases="vllm",
        removable="vLLM's clients remove them",
        applied="import of vLLM's engine client, in API servers and processes of LLM",
    ),
    Patch(
        "vllm.v1.engine.core_client",
        ("_process_utility_output",),
        kind="wrap",
        by="engine/metrics.py",
        what="results of the plugin's own call id are metrics, and are shown with vLLM's",
        why="the values of an engine core have to reach the process that answers /metrics",
        releases="vllm",
        removable="vLLM lets plugins add statistics to those of its scheduler",
        applied="import of vLLM's engine client, in API servers and processes of LLM",
    ),
    Patch(
        "vllm.v1.fault_tolerance.engine_core_sentinel",
        ("EngineCoreSentinel.on_fault",),
        kind="wrap",
        by="engine/fault_tolerance.py",
        what="/fault_tolerance/status has the first cause of an engine that is dead",
        why="vLLM reports the status alone, and nobody learns there which worker failed",
        releases="vllm >=0.27",
        removable="vLLM's status has the cause of its executor's failure",
        applied="start of the executor with --enable-fault-tolerance",
    ),
    # ---- vLLM and vllm-ascend: graphs and pipelines ----
    Patch(
        "vllm.envs",
        ("compile_factors",),
        kind="wrap",
        by="executor/worker.py",
        what="the key of compiled code has the index of the worker's device",
        why="an engine that gets other NPUs of its node than the one before loads code for those, and fails",
        releases="vllm",
        removable="vLLM's cache of compiled code is by device",
        applied="start of a worker",
    ),
    Patch(
        "vllm_ascend.worker.model_runner_v1",
        ("NPUModelRunner.capture_model",),
        kind="wrap",
        by="acl_graphs/hooks.py",
        what="a capture that fails because streams ran out is tried again with fewer graphs",
        why="the engine does not start: CANN 207008, no stream left",
        releases="vllm-ascend",
        removable="vllm-ascend falls back by itself",
        applied="import of vllm_ascend.worker.worker, in a worker",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner",
        ("GPUModelRunner._warmup_and_capture",),
        kind="wrap",
        by="acl_graphs/hooks.py",
        what="on vllm-ascend's model runner only: ranks agree after each graph whether its capture succeeded",
        why="a rank whose capture fails leaves its siblings waiting in HCCL",
        releases="vllm",
        removable="vllm-ascend falls back by itself",
        applied="import of vllm_ascend.worker.worker, in a worker",
    ),
    Patch(
        "vllm_ascend.worker.model_runner_v1",
        ("NPUModelRunner._update_full_graph_params_if_needed",),
        kind="wrap",
        by="acl_graphs/hooks.py",
        what="an update of a graph's parameters that fails lets the graph run to its end",
        why="the next synchronisation never returns",
        releases="vllm-ascend",
        removable="vllm-ascend records its events whatever happens",
        applied="import of vllm_ascend.worker.worker, in a worker",
    ),
    Patch(
        "vllm_ascend.compilation.updatable_graph",
        ("UpdatableGraph.update",),
        kind="wrap",
        by="acl_graphs/hooks.py",
        what="an update of a graph that fails lets the graph run to its end",
        why="the next synchronisation never returns",
        releases="vllm-ascend >=0.29.0rc1",
        removable="vllm-ascend records its events whatever happens",
        applied="import of vllm_ascend.worker.worker, in a worker",
    ),
    Patch(
        "vllm_ascend.worker.worker",
        ("NPUWorker.sleep", "NPUWorker.wake_up"),
        kind="wrap",
        by="acl_graphs/hooks.py",
        what="graphs are released before a sleep, and captured again after it",
        why="graphs keep streams and memory while the engine sleeps, and replay on memory that was moved",
        releases="vllm-ascend",
        removable="vllm-ascend's sleep mode releases graphs by default",
        applied="import of vllm_ascend.worker.worker, in a worker",
    ),
    Patch(
        "torch_npu.npu.graphs",
        ("NPUGraph.capture_begin", "NPUGraph.capture_end"),
        kind="wrap",
        by="accelerators/captures.py",
        what="other work on the device and captures exclude each other; a failed capture gives its memory pool back",
        why="a call that waits or allocates, from any thread, breaks a capture (CANN 107030)",
        releases="torch-npu",
        removable="torch_npu reports captures of other threads, and ends its pool's recording after a failed one",
        applied=_WORKER_START,
    ),
    Patch(
        "torch.cuda.graphs",
        ("CUDAGraph.capture_begin", "CUDAGraph.capture_end"),
        kind="wrap",
        by="accelerators/captures.py",
        what="the same on GPUs",
        why="a call that waits or allocates, from any thread, breaks a capture (cudaErrorStreamCaptureUnsupported)",
        releases="torch",
        removable="torch reports captures of other threads",
        applied=_WORKER_START,
    ),
    Patch(
        "vllm.distributed.parallel_state",
        ("GroupCoordinator.isend_tensor_dict", "GroupCoordinator.irecv_tensor_dict"),
        kind="replace",
        by="compiled_graph/worker.py",
        what="on the pipeline group of a worker only: the compiled graph carries the tensors between stages",
        why="vLLM's worker sends them itself",
        releases="vllm",
        removable="vLLM's workers take and return tensors between stages",
        applied=_GRAPH_START,
    ),
    # ---- Ray ----
    Patch(
        "ray.experimental.channel.shared_memory_channel",
        ("Channel.read",),
        kind="wrap",
        by="compiled_graph/read_backoff.py",
        what="reads pause while they wait",
        why="each reader of an idle graph spins on a core of its own (2.60, ReadAcquire)",
        releases="ray",
        removable="Ray's readers block",
        applied=_GRAPH_START,
    ),
    Patch(
        "ray.dag.dag_node",
        ("DAGNode.with_tensor_transport",),
        kind="wrap",
        by="ray_transport/registration.py",
        what='"hccl" and "accelerator" are names of the transport too',
        why='Ray knows "nccl" only; its own "accelerator" raises by mistake (2.48)',
        releases="ray",
        removable="Ray takes names of registered communicators",
        applied=_RAY_REGISTER,
    ),
    Patch(
        "ray.dag.compiled_dag_node",
        ("CompiledDAG._get_gpu_ids",),
        kind="replace",
        by="ray_transport/registration.py",
        what='transport "auto" sees the NPUs of an actor that has no GPU',
        why="tensors of actors with NPUs go through host memory without notice (vllm-ascend #901)",
        releases="ray",
        removable="Ray asks for the registered accelerator: patches/ray/0001",
        applied=_RAY_REGISTER,
    ),
    Patch(
        "ray.experimental.channel.accelerator_context",
        (
            "AcceleratorContext.get_accelerator_devices",
            "AcceleratorContext.get_device_context",
            "AcceleratorContext.current_stream",
        ),
        kind="wrap",
        by="ray_transport/accelerator_context.py",
        what="for NPUs only: the assigned device, set for the thread that uses it",
        why='without a visible list Ray fails ("set incorrectly"); a thread without one opens another actor\'s NPU',
        releases="ray",
        removable="Ray resolves devices without a list: patches/ray/0002",
        applied=_RAY_ACTOR,
    ),
    Patch(
        "ray.experimental.channel.serialization_context",
        ("_SerializationContext.serialize_to_numpy_or_scalar",),
        kind="wrap",
        by="ray_transport/accelerator_context.py",
        what="NPU tensors that go through host memory are counted, the first one is logged",
        why="a missing annotation costs bandwidth and nobody notices",
        releases="ray",
        removable="Ray reports it",
        applied=_RAY_ACTOR,
    ),
    Patch(
        "ray.experimental.channel.serialization_context",
        (
            "_SerializationContext._use_external_transport",
            "_SerializationContext._out_of_band_tensors",
            "_SerializationContext._deserialized_tensor_placeholders",
        ),
        kind="add",
        by="ray_transport/accelerator_context.py",
        what="descriptors on the class: the state of the message at hand is kept for each thread",
        why="two graphs in one actor mix their messages",
        releases="ray",
        removable="Ray's serialisation context is one for each thread",
        applied=_RAY_ACTOR,
    ),
    Patch(
        "ray.experimental.channel.torch_tensor_accelerator_channel",
        ("TorchTensorAcceleratorChannel.write",),
        kind="wrap",
        by="ray_transport/accelerator_context.py",
        what="between nodes a write waits until the reader has the tensors of the message before",
        why="the raylet of the reader's node waits for one channel and takes no other (ray-project/ray#49044)",
        releases="ray",
        removable="Ray's channels between nodes do not block each other",
        applied=_RAY_ACTOR,
    ),
    # ---- elastic expert parallelism ----
    Patch(
        "vllm.platforms.interface",
        ("Platform.stateless_init_device_torch_dist_pg",),
        kind="replace",
        by="elastic_ep/groups.py",
        what="on the NPU platform only: a process group over HCCL that is independent of torch's world",
        why="vLLM's platform interface leaves it out: NotImplementedError",
        releases="vllm",
        removable="vllm-ascend has it",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm.distributed.stateless_coordinator",
        ("StatelessGroupCoordinator",),
        kind="subclass",
        by="elastic_ep/groups.py",
        what="NpuStatelessGroup",
        why="upstream's asserts that its communicator is CUDA's, and takes the local rank for the device",
        releases="vllm",
        removable="vLLM asks the platform for the communicator of stateless groups",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm_ascend.distributed.parallel_state",
        ("_MC2",),
        kind="replace",
        by="elastic_ep/groups.py",
        what="a stateless group over the ranks of all engines",
        why="vllm-ascend creates it from torch's world, which is one engine, and cannot change it",
        releases="vllm-ascend",
        removable="vllm-ascend supports elastic expert parallelism",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm_ascend.platform",
        ("_validate_eplb_config",),
        kind="wrap",
        by="platform_patch.py",
        what="is not asked about engines with --enable-elastic-ep: elastic_ep/admission.py checks these",
        why="it refuses vLLM's expert load balancing with the model runner that elastic expert parallelism needs",
        releases="vllm-ascend >=0.27.1rc1",
        removable="vllm-ascend supports elastic expert parallelism",
        applied="check of a configuration with --enable-elastic-ep",
    ),
    Patch(
        "vllm_ascend.worker.worker",
        ("NPUWorker._init_worker_distributed_environment:init_ascend_model_parallel",),
        kind="rebind",
        by="elastic_ep/worker.py",
        what="creates the MC2 group over the ranks of all engines",
        why="vllm-ascend's asks torch for the backend of the world's group: an error for a stateless one",
        releases="vllm-ascend",
        removable="vllm-ascend supports elastic expert parallelism",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm_ascend.patch.platform.patch_fused_moe",
        ("get_current_vllm_config",),
        kind="replace",
        by="elastic_ep/layers.py",
        what="the same configuration, which says that the second model runner is used",
        why="only the MoE layers of vllm-ascend's second model runner have experts that vLLM can move",
        releases="vllm-ascend >=0.27.1rc1",
        removable="vLLM and vllm-ascend have elastic expert parallelism in the same model runner",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm_ascend.ops.fused_moe.routed_experts",
        ("get_current_vllm_config",),
        kind="replace",
        by="elastic_ep/layers.py",
        what="the same configuration, which says that the second model runner is used",
        why="only the MoE layers of vllm-ascend's second model runner have experts that vLLM can move",
        releases="vllm-ascend >=0.27.1rc1",
        removable="vLLM and vllm-ascend have elastic expert parallelism in the same model runner",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner",
        ("MoERunner._set_moe_config",),
        kind="wrap",
        by="elastic_ep/layers.py",
        what="on vllm-ascend's subclass only: keeps the groups that vllm-ascend has added to the configuration",
        why="vLLM replaces the configuration of each layer when an engine is scaled: AttributeError in the next step",
        releases="vllm >=0.24",
        removable="vllm-ascend supports elastic expert parallelism",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm_ascend.distributed.eplb.eplb_state",
        ("AscendEplbLayerState._set_local_expert_range",),
        kind="replace",
        by="elastic_ep/layers.py",
        what="the experts of this rank by the engine's present size",
        why="vllm-ascend divides the room for the largest size by the present one: an error in the first step",
        releases="vllm-ascend >=0.30.0rc1",
        removable="vllm-ascend supports elastic expert parallelism",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm_ascend.ops.fused_moe.eplb",
        ("build_expert_replica_routing_table",),
        kind="wrap",
        by="elastic_ep/layers.py",
        what="the same table on all ranks",
        why="ranks that gather tokens before they choose experts compute a token twice or not at all: wrong text",
        releases="vllm-ascend >=0.27.1rc1",
        removable="vllm-ascend builds the same table on all ranks that gather tokens: patches/vllm-ascend/0003",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm.distributed.eplb.eplb_state",
        ("create_eplb_communicator",),
        kind="wrap",
        by="elastic_ep/experts.py",
        what="for stateless groups: communicators that move experts over HCCL or gloo",
        why="vLLM's need NCCL or NIXL, vllm-ascend's look up ranks that stateless groups do not have",
        releases="vllm",
        removable="vllm-ascend supports elastic expert parallelism",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm_ascend.worker.block_table",
        ("BlockTable.clear",),
        kind="replace",
        by="elastic_ep/block_tables.py",
        what="fills both copies of the table with zeros",
        why="vllm-ascend's calls a method that its buffers do not have: AttributeError when an engine is scaled",
        releases="vllm-ascend",
        removable="vllm-ascend clears both copies",
        applied=_ELASTIC_WORKER,
    ),
    Patch(
        "vllm.distributed.elastic_ep.elastic_state",
        ("ElasticEPScalingState",),
        kind="subclass",
        by="engine/elastic_state.py",
        what="GuardedScalingState: a preparation that fails is reported and can be rolled back",
        why="the exception comes out of the busy loop: the ranks that serve die minutes after a new one has",
        releases="vllm",
        removable="vLLM can give up a prepared scaling (vllm #53947)",
        applied="start of an engine core with --enable-elastic-ep",
    ),
    Patch(
        "vllm.v1.engine.core_client",
        ("DPLBAsyncMPClient.prepare_elastic_ep", "DPLBAsyncMPClient.commit_elastic_ep"),
        kind="wrap",
        by="engine/elastic_client.py",
        what="a preparation that fails is undone, ranks that leave finish their requests, a failed switch ends all",
        why="new ranks that died stay in the lists, and the next scaling counts wrong",
        releases="vllm >=0.27",
        removable="vLLM can give up a prepared scaling (vllm #53947)",
        applied=_ELASTIC_SERVER,
    ),
    Patch(
        "vllm.v1.engine.core_client",
        ("AsyncMPClient.collective_rpc_async",),
        kind="wrap",
        by="engine/elastic_client.py",
        what="a call that changes weights is noted: no rank joins afterwards",
        why="ranks that join load the model from its file: they answer with the old weights, and with new experts",
        releases="vllm",
        removable="ranks that join receive all weights from those that serve",
        applied=_ELASTIC_SERVER,
    ),
    Patch(
        "vllm.v1.engine.async_llm",
        ("AsyncLLM._scale_elastic_ep",),
        kind="wrap",
        by="engine/elastic_client.py",
        what="the server answers again after a scaling that failed",
        why="it answers 503 for ever",
        releases="vllm >=0.27",
        removable="vLLM resets its state in a finally clause",
        applied=_ELASTIC_SERVER,
    ),
    Patch(
        "vllm.entrypoints.serve.elastic_ep.api_router",
        ("HTTPException",),
        kind="replace",
        by="engine/elastic_client.py",
        what="the answer to a request to scale says why it failed",
        why='it says "Scale failed"',
        releases="vllm",
        removable="vLLM's answer contains the error",
        applied=_ELASTIC_SERVER,
    ),
    Patch(
        "vllm.v1.engine.core_client",
        (
            "DPLBAsyncMPClient.__init__",
            "DPLBAsyncMPClient.get_core_engine_for_request",
            "DPLBAsyncMPClient.call_utility_async",
            "DPLBAsyncMPClient.eep_process_engine_core_notification",
            "DPAsyncMPClient.add_request_async",
            "AsyncMPClient._call_utility_async",
        ),
        kind="wrap",
        by="engine/rank_client.py",
        what="requests and calls of a data parallel rank that is down fail immediately, the other ranks serve",
        why="vLLM waits for the answers of a rank that is gone, and sends it further requests",
        releases="vllm",
        removable="vLLM serves with the data parallel ranks that live",
        applied=_RECOVERING_SERVER,
    ),
    Patch(
        "vllm.v1.engine.core_client",
        ("AsyncMPClient.call_utility_all_async",),
        kind="wrap",
        by="engine/rank_client.py",
        what="calls of all data parallel ranks leave out those that are down, or are refused",
        why="vLLM calls the others, and waits for the answers of a rank that is gone",
        releases="vllm >=0.32",
        removable="vLLM serves with the data parallel ranks that live",
        applied=_RECOVERING_SERVER,
    ),
    Patch(
        "vllm.v1.engine.async_llm",
        ("AsyncLLM.check_health",),
        kind="wrap",
        by="engine/rank_client.py",
        what="/health answers 503 where all data parallel ranks are down, or some, where the user wants that",
        why="it answers 200",
        releases="vllm",
        removable="vLLM serves with the data parallel ranks that live",
        applied=_RECOVERING_SERVER,
    ),
    Patch(
        "vllm.v1.engine.async_llm",
        ("AsyncLLM.generate", "AsyncLLM.encode"),
        kind="wrap",
        by="engine/rank_client.py",
        what="a request that a failure ends before its first token ends with an error, and a pooling request",
        why="the stream of such a request ends as if it had been served, with no text",
        releases="vllm",
        removable="the oldest supported vLLM is 0.33, whose streams report it, and pooling requests report it too",
        applied=_RECOVERING_SERVER,
    ),
    # ---- Ray Serve LLM ----
    Patch(
        "ray.llm._internal.serve.core.configs.accelerators",
        ("GPUAccelerator.default_bundles", "GPUAccelerator.get_remote_options"),
        kind="wrap",
        by="compat/ray_llm.py",
        what="on the NPU platform: bundles that Ray makes by itself name NPUs, and so does the configuration's task",
        why="a replica waits for GPUs (ray #62983, vllm-ascend #8156), or its start fails: no bundle fits",
        releases="ray >=2.56",
        removable=_RAY_KNOWS_NPUS,
        applied=_PLATFORM_LOAD,
    ),
    Patch(
        "ray.llm._internal.serve.core.configs.llm_config",
        ("infer_hardware_kind_from_bundles",),
        kind="wrap",
        by="compat/ray_llm.py",
        what="bundles with NPUs are accelerator bundles",
        why="Ray takes them for a deployment on CPUs: executor mp, an explicit ray is overwritten",
        releases="ray >=2.56",
        removable=_RAY_KNOWS_NPUS,
        applied=_PLATFORM_LOAD,
    ),
    Patch(
        "ray.llm._internal.serve.core.configs.llm_config",
        ("AcceleratorType",),
        kind="replace",
        by="compat/ray_llm.py",
        what="Ray's accelerator types, and any name of an Ascend chip",
        why="accelerator_type takes Ascend910B and Ascend910B4 alone, while nodes label themselves Ascend910B3",
        releases="ray >=2.56",
        removable="Ray accepts what its nodes report",
        applied=_PLATFORM_LOAD,
    ),
    Patch(
        "ray.llm._internal.serve.core.configs.llm_config",
        ("LLMConfig._check_accelerator_type_matches_hardware",),
        kind="wrap",
        by="compat/ray_llm.py",
        what="on the NPU platform: the name of a GPU is dropped, with a warning, where the bundles are of NPUs",
        why="Ray's own examples name one (A10G), and their replicas would wait forever for a node that has both",
        releases="ray >=2.56",
        removable=_RAY_KNOWS_NPUS,
        applied=_PLATFORM_LOAD,
    ),
    Patch(
        "ray.llm._internal.serve.engines.vllm.vllm_engine",
        ("VLLMEngine.shutdown",),
        kind="wrap",
        by="compat/ray_llm.py",
        what="a replica that Serve ends shuts its engine down first",
        why="Ray kills the engine core with the replica: workers end by a lost connection, and sockets stay in /tmp",
        releases="ray >=2.58",
        removable="Ray shuts its engine down there",
        applied=_PLATFORM_LOAD,
    ),
    Patch(
        "ray.llm._internal.serve.engines.vllm.kv_transfer.factory",
        ("KVConnectorBackendFactory.get_backend_class",),
        kind="wrap",
        by="compat/ray_llm.py",
        what="vllm-ascend's Mooncake connectors have a backend, unless the user has registered one",
        why="all replicas of a node listen at the same ports, and have equal engine ids",
        releases="ray >=2.52",
        removable="Ray has a backend for them",
        applied=_PLATFORM_LOAD,
    ),
    Patch(
        "ray.llm._internal.serve.engines.vllm.kv_transfer.multi_connector",
        ("MultiConnectorBackend.setup",),
        kind="wrap",
        by="compat/ray_llm.py",
        what="port and engine id that Mooncake's backend has set stay in the connectors of a MultiConnector",
        why="Ray gives backends a copy of the configuration, and drops it",
        releases="ray >=2.52",
        removable="Ray sets up the connectors' own configurations",
        applied=_PLATFORM_LOAD,
    ),
    Patch(
        "ray.llm._internal.serve.engines.vllm.vllm_models",
        ("VLLMEngineConfig._detect_fractional_gpu_from_pg",),
        kind="wrap",
        by="compat/ray_llm.py",
        what="parts of NPUs in bundles are the share of each worker, as parts of GPUs are",
        why="a worker asks for a whole NPU, which a bundle with half of one never has",
        releases="ray >=2.53",
        removable=_RAY_KNOWS_NPUS,
        applied=_PLATFORM_LOAD,
    ),
)

ROWS: dict[str, Patch] = {target: patch for patch in PATCHES for target in patch.targets}
"""Each row by each of its targets."""

_UPSTREAM = frozenset({"vllm", "vllm_ascend", "ray", "torch", "torch_npu", "vllm_ray_ascend", "builtins"})
"""Whose replacements are expected: upstream's own, such as vllm-ascend's of vLLM, and ours."""
_REMEDY = (
    "Install releases that this version supports (docs/compatibility.md) or a newer vllm-ray-ascend, or turn it off: "
    "VLLM_RAY_ASCEND_EXECUTOR=upstream for executor and engine, VLLM_RAY_ASCEND=0 for everything."
)
_ABSENT: Any = object()
_TRACING_WRAPPER = "_resume_span"
"""The function of ray.util.tracing.tracing_helper that Ray puts around each method of an actor's class."""


def apply(target: str, replacement: Any, owner: Any = None) -> None:
    """Let ``target`` mean ``replacement``; `original` still finds what it was. May be called again.

    ``owner`` is the object whose attribute is set, where that is not the one that ``target`` names: a subclass or an
    instance. What somebody else has put there since an earlier call, around ours, stays.

    Raises UpstreamChangedError where ``target`` has no row, or is gone.
    """
    row, owner, name = _resolve(target, owner)
    before = getattr(owner, name, _ABSENT)
    again = is_applied(target, owner)
    if before is replacement or (again and is_third_party(before)):
        return
    if not again:
        if is_third_party(before) and not _is_subclass(replacement, before):
            logger.warning(
                "VRA-105: %s was replaced by %s before vllm-ray-ascend replaces it (%s): theirs is not called. Where "
                "that is needed, turn ours off: VLLM_RAY_ASCEND_EXECUTOR=upstream or VLLM_RAY_ASCEND=0.",
                target,
                _definer(before),
                row.what,
            )
        setattr(owner, _original_name(name), before)
    _set(owner, name, before, replacement)


def wrap(target: str, decorator: Callable[[Any], Any], owner: Any = None) -> None:
    """Let ``target`` mean ``decorator`` of what it is, once: later calls change nothing.

    What somebody else has put there before is wrapped as it is. ``owner`` and errors are those of `apply`.
    """
    _, owner, name = _resolve(target, owner)
    if is_applied(target, owner):
        return
    before = getattr(owner, name)
    replacement = decorator(before)
    setattr(owner, _original_name(name), before)
    _set(owner, name, before, replacement)


def _set(owner: Any, name: str, before: Any, replacement: Any) -> None:
    """Set an attribute; of a method in the classes of Ray's actors too.

    Ray gives such a class wrappers of its own around all methods, also inherited ones: a method that is replaced in a
    base class afterwards would never be called.
    """
    setattr(owner, name, replacement)
    for actor_class in _subclasses(owner) if isinstance(owner, type) else ():
        if _is_tracing_wrapper(vars(actor_class).get(name), before):
            delattr(actor_class, name)


def _is_tracing_wrapper(method: Any, of: Any) -> bool:
    code = getattr(method, "__code__", None)
    return getattr(code, "co_name", "") == _TRACING_WRAPPER and getattr(method, "__wrapped__", None) is of


def _subclasses(owner: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(owner)
    for child in children:
        yield child
        yield from _subclasses(child)


def add_entries(target: str, entries: Mapping[str, Any]) -> None:
    """Add to the mapping ``target`` those of ``entries`` that it lacks. Errors are those of `apply`."""
    _, owner, name = _resolve(target, None)
    mapping = getattr(owner, name)
    for key, value in entries.items():
        mapping.setdefault(key, value)


def original(target: str, owner: Any = None) -> Any:
    """Return what ``target`` is without us. Errors are those of `apply`."""
    _, owner, name = _resolve(target, owner)
    return getattr(owner, _original_name(name) if is_applied(target, owner) else name)


def is_applied(target: str, owner: Any = None) -> bool:
    """Return whether ``target`` has our replacement on this very object, not only on a parent of it."""
    _, owner, name = _resolve(target, owner, may_be_gone=True)
    return _original_name(name) in vars(owner)


def with_globals(target: str, function: Any, **replacements: Any) -> FunctionType:
    """Return ``function``, or a bound method as a function, with these of its global names replaced.

    The module, other functions and other threads see nothing of it. For upstream functions that are one piece without
    hooks, such as RayExecutorV2._init_executor: what they look up in their module is the same in vLLM 0.23 to 0.33.
    Where somebody has wrapped the function, the wrapper is what is called, and calls the function with our globals.

    Raises UpstreamChangedError where a name has no row ``target:name``; where the function no longer uses a name, since
    the replacement would then be lost without notice; and where the function was replaced by one that does not call it.
    """
    rows = [_row(f"{target}:{name}") for name in replacements]
    given = getattr(function, "__func__", function)
    path = target.removeprefix(f"{rows[0].module}.")
    rebound = _rebind(given, rows[0].module, path, replacements, set())
    if rebound is None:
        raise bypassed_error(target, given, replacements)
    return rebound


def bypassed_error(target: str, found: Any, replacements: Iterable[str]) -> UpstreamChangedError:
    """Return the error for a function ``found`` in the place of ``target`` that does not lead to vLLM's own."""
    return UpstreamChangedError(
        "VRA-104",
        f"{target} was replaced by {_definer(found)}, which does not call vLLM's own in a way that can be followed, "
        f"and vllm-ray-ascend has to replace {', '.join(replacements)} there. Let the replacement be a function that "
        "calls the one it replaces (functools.wraps), or set VLLM_RAY_ASCEND_EXECUTOR=upstream.",
    )


def is_upstream_class(module: str, found: type) -> bool:
    """Return whether a class that stands under a name of ``module`` is the one that this module defines."""
    return found.__module__ == module


def upstream_class(module: str, found: type) -> type:
    """Return the class that ``module`` defines, of which ``found``, under a name of it, is a subclass or which it is.

    Raises UpstreamChangedError where somebody has put another class there.
    """
    for each in found.__mro__:
        if is_upstream_class(module, each):
            return each
    raise UpstreamChangedError(
        "VRA-106",
        f"a class of {module} was replaced by {_definer(found)}, which is no subclass of it, so that vllm-ray-ascend "
        "has nothing to build on. Derive the replacement from the class it replaces, or set "
        "VLLM_RAY_ASCEND_EXECUTOR=upstream.",
    )


def _row(target: str) -> Patch:
    row = ROWS.get(target)
    if row is None:
        raise UpstreamChangedError(
            "VRA-101",
            f"{target} is not in the table of upstream names that vllm-ray-ascend patches (vllm_ray_ascend/patches.py, "
            "`vllm-ray-ascend env --patches`). Add a row for it.",
        )
    return row


def _resolve(target: str, owner: Any, *, may_be_gone: bool = False) -> tuple[Patch, Any, str]:
    """Return the row of ``target``, the object whose attribute it is, and the attribute's name."""
    row = _row(target)
    *holders, name = target.removeprefix(f"{row.module}.").split(".")
    if owner is None:
        owner = import_module(row.module)
        for holder in holders:
            owner = getattr(owner, holder, _ABSENT)
    if not may_be_gone and (owner is _ABSENT or (row.kind != "add" and not hasattr(owner, name))):
        raise UpstreamChangedError(
            "VRA-102",
            f"{target} is gone, which vllm-ray-ascend patches (vllm_ray_ascend/{row.by}: {row.what}). {_REMEDY}",
        )
    return row, owner, name


def _original_name(name: str) -> str:
    return f"_vllm_ray_ascend_upstream_{name}"


def _definer(value: Any) -> str:
    """Return by whom a function or class was defined, as functools.wraps does not change it."""
    namespace = getattr(value, "__globals__", None)
    module = namespace.get("__name__") if namespace else getattr(value, "__module__", None)
    name = value.__code__.co_name if namespace else getattr(value, "__qualname__", type(value).__qualname__)
    return f"{module or type(value).__module__}.{name}"


def is_third_party(value: Any) -> bool:
    """Return whether a function or class is neither upstream's nor ours. Plain values are nobody's."""
    return (isinstance(value, type) or callable(value)) and _definer(value).partition(".")[0] not in _UPSTREAM


def _is_subclass(replacement: Any, before: Any) -> bool:
    return isinstance(replacement, type) and isinstance(before, type) and issubclass(replacement, before)


def _rebind(
    function: Any, module: str, path: str, replacements: Mapping[str, Any], visited: set[int]
) -> FunctionType | None:
    """Return ``module``'s function ``path`` with other globals, within copies of the wrappers that lead to it.

    None where ``function`` does not lead there by what it holds: its closure, its defaults, globals that it uses.
    """
    if not isinstance(function, FunctionType) or id(function) in visited:
        return None
    visited.add(id(function))
    names = set(_global_names(function.__code__))
    namespace = function.__globals__
    is_target = namespace.get("__name__") == module and function.__qualname__ == path
    lost = sorted(name for name in replacements if name not in names or name not in namespace)
    if is_target and not lost:
        return _copy(function, {**namespace, **replacements})
    for inner in _held(function, names):
        rebound = _rebind(inner, module, path, replacements, visited)
        if rebound is not None:
            if found := {name for name in names if namespace.get(name) is inner}:
                namespace = {**namespace, **dict.fromkeys(found, rebound)}
            return _copy(function, namespace, inner, rebound)
    if is_target:
        raise UpstreamChangedError(
            "VRA-103", f"{module}.{path} no longer uses {', '.join(lost)}, which vllm-ray-ascend replaces. {_REMEDY}"
        )
    return None


def _held(function: FunctionType, names: set[str]) -> Iterator[Any]:
    """Yield what a function could call: what its closure, its defaults and its global names refer to."""
    for cell in function.__closure__ or ():
        if cell != CellType():  # an empty one refers to nothing yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from (function.__globals__[name] for name in sorted(names) if name in function.__globals__)


def _copy(function: FunctionType, namespace: dict[str, Any], held: Any = _ABSENT, instead: Any = None) -> FunctionType:
    """Return a copy of ``function`` with ``namespace`` as its globals, which has ``instead`` of what it ``held``."""

    def swap(value: Any) -> Any:
        return instead if value is held else value

    closure = function.__closure__ and tuple(
        cell if cell == CellType() or cell.cell_contents is not held else CellType(instead)
        for cell in function.__closure__
    )
    defaults = function.__defaults__ and tuple(map(swap, function.__defaults__))
    copy = FunctionType(function.__code__, namespace, function.__name__, defaults, closure)
    copy.__kwdefaults__ = function.__kwdefaults__ and {
        name: swap(each) for name, each in function.__kwdefaults__.items()
    }
    copy.__qualname__ = function.__qualname__
    return copy


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
