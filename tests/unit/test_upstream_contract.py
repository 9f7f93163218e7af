"""Every upstream name that we replace or call is in the installed vLLM and vllm-ascend; read from their sources.

Nothing is imported, so that the same test can be pointed at the sources of other versions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import distribution, entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit


def source(package: str, module: str) -> ast.Module:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return ast.parse((Path(spec.origin).parent / module).read_text())


def method(tree: ast.Module, class_name: str, name: str) -> ast.FunctionDef:
    owner = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return next(node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == name)


def names(tree: ast.AST) -> Iterator[str]:
    return (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


@pytest.fixture(scope="module")
def executor() -> ast.Module:
    return source("vllm", "v1/executor/ray_executor_v2.py")


@pytest.mark.parametrize(
    "name",
    [
        "ray",
        "RayWorkerProc",
        "WORKER_SPECIFIC_ENV_VARS",
        "initialize_ray_cluster",
        "build_actor_name",
        "get_bundles_sorted_by_node",
    ],
)
def test_the_executors_start_looks_up_what_we_replace(executor: ast.Module, name: str) -> None:
    assert name in names(method(executor, "RayExecutorV2", "_init_executor"))


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("RayExecutorV2", "_build_runtime_env"),
        ("RayExecutorV2", "shutdown"),
        ("RayWorkerProc", "__init__"),
        ("RayWorkerProc", "initialize_worker"),
    ],
)
def test_methods_that_we_override_exist(executor: ast.Module, class_name: str, name: str) -> None:
    assert method(executor, class_name, name)


def test_the_executors_class_is_looked_up_in_its_module_at_each_call() -> None:
    get_class = method(source("vllm", "v1/executor/abstract.py"), "Executor", "get_class")
    imported = [alias.name for node in ast.walk(get_class) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert "RayExecutorV2" in imported


def test_vllm_ascends_platform_has_the_members_that_we_set() -> None:
    tree = source("vllm_ascend", "platform.py")
    platform = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "NPUPlatform")
    assert [ast.unparse(base) for base in platform.bases] == ["Platform"]
    fields = {
        node.target.id
        for node in platform.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert {"ray_device_key", "device_control_env_var", "ray_noset_device_env_vars"} <= fields
    assert method(tree, "NPUPlatform", "check_and_update_config")


def test_vllm_ascends_plugins_are_recognised_as_its_own() -> None:
    distribution("vllm-ascend")
    own = [plugin for plugin in entry_points(group="vllm.general_plugins") if plugin.module.startswith("vllm_ascend")]
    platforms = entry_points(group="vllm.platform_plugins", name="ascend")
    assert own and [plugin.module for plugin in platforms] == ["vllm_ascend"]


def test_vllm_keeps_its_known_variables_in_a_dictionary() -> None:
    tree = source("vllm", "envs.py")
    assigned = [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    assert any(isinstance(target, ast.Name) and target.id == "environment_variables" for target in assigned)


@pytest.fixture(scope="module")
def engine_utils() -> ast.Module:
    return source("vllm", "v1/engine/utils.py")


@pytest.mark.parametrize("module", ["v1/engine/utils.py", "v1/utils.py"])
def test_paths_of_sockets_are_asked_for_by_a_name_that_we_replace(module: str) -> None:
    assert "get_open_zmq_ipc_path" in names(source("vllm", module))


def test_a_queues_handle_has_the_paths_of_its_sockets() -> None:
    tree = source("vllm", "distributed/device_communicators/shm_broadcast.py")
    handle = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Handle")
    fields = {ast.unparse(node.target) for node in handle.body if isinstance(node, ast.AnnAssign)}
    assert {"local_subscribe_addr", "local_notify_addr"} <= fields


@pytest.mark.parametrize("name", ["get_env_vars_to_copy", "CoreEngineActorManager"])
def test_the_managers_start_looks_up_what_we_replace(engine_utils: ast.Module, name: str) -> None:
    assert name in names(method(engine_utils, "CoreEngineActorManager", "__init__"))


@pytest.mark.parametrize("name", ["__init__", "scale_up_elastic_ep"])
def test_engine_cores_have_their_addresses_by_keyword(engine_utils: ast.Module, name: str) -> None:
    made = [
        {keyword.arg for keyword in node.keywords}
        for node in ast.walk(method(engine_utils, "CoreEngineActorManager", name))
        if isinstance(node, ast.Call) and "dp_rank" in {keyword.arg for keyword in node.keywords}
    ]
    assert made and all("addresses" in keywords for keywords in made)


def test_the_manager_asks_itself_for_the_groups_of_scale_up(engine_utils: ast.Module) -> None:
    scale_up = method(engine_utils, "CoreEngineActorManager", "scale_up_elastic_ep")
    assert "self.add_dp_placement_groups" in {
        ast.unparse(node.func) for node in ast.walk(scale_up) if isinstance(node, ast.Call)
    }


def test_a_function_assigns_devices_to_engine_processes(engine_utils: ast.Module) -> None:
    defined = {node.name for node in engine_utils.body if isinstance(node, ast.FunctionDef)}
    assert {"set_assigned_physical_gpu_ids_for_dp_rank", "set_device_control_env_var"} & defined


@pytest.mark.parametrize("name", ["EngineCoreActor", "DPMoEEngineCoreActor"])
def test_engine_core_actors_ask_the_method_that_we_override(name: str) -> None:
    tree = source("vllm", "v1/engine/core.py")
    actor = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    assert "EngineCoreActorMixin" in [ast.unparse(base) for base in actor.bases]
    calls = ast.unparse(method(tree, "EngineCoreActorMixin", "__init__"))
    assert "self._set_visible_devices(vllm_config, local_dp_rank)" in calls


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("dag/compiled_dag_node.py", "_teardown_done"),
        ("dag/compiled_dag_node.py", "_is_teardown"),
        ("dag/compiled_dag_node.py", "_monitor"),
        ("dag/compiled_dag_node.py", "_proxy_actor"),
        ("dag/compiled_dag_node.py", "_dag_submitter"),
        ("dag/compiled_dag_node.py", "_dag_output_fetcher"),
        ("dag/compiled_dag_node.py", "worker_task_refs"),
        ("dag/compiled_dag_node.py", "actor_to_executable_tasks"),
        ("experimental/channel/common.py", "read_iteration_timeout"),
        ("experimental/channel/common.py", "communicators"),
    ],
)
def test_rays_graphs_have_what_the_compiled_graph_executor_sets_and_reads(module: str, name: str) -> None:
    attributes = {node.attr for node in ast.walk(source("ray", module)) if isinstance(node, ast.Attribute)}
    assert name in attributes


@pytest.mark.parametrize("name", ["irecv_tensor_dict", "isend_tensor_dict"])
@pytest.mark.parametrize(
    ("package", "module"), [("vllm", "v1/worker/gpu_worker.py"), ("vllm_ascend", "worker/worker.py")]
)
def test_workers_send_and_receive_by_what_the_carrier_replaces(package: str, module: str, name: str) -> None:
    called = {node.attr for node in ast.walk(source(package, module)) if isinstance(node, ast.Attribute)}
    assert name in called and method(source("vllm", "distributed/parallel_state.py"), "GroupCoordinator", name)
