"""Our device mapping wins over vllm-ascend's patch of it, in whatever order things are imported."""

from __future__ import annotations

import pytest

from tests.softnpu.processes import check_python

pytestmark = pytest.mark.softnpu

BEGIN = """
import os, sys
os.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0,1"
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
"""
PATCH = "import vllm_ascend.patch.platform.patch_dp_device_ids\n"
ENGINE = "import vllm.v1.engine.utils, vllm.v1.engine.core\n"
PLUGINS = "load_general_plugins()\n"
OURS = "import vllm.v1.executor.ray_executor_v2\n"
ASK = """
from vllm.v1.engine import core, utils
for module in (utils, core):
    try:
        print(module.get_physical_gpu_ids_for_local_dp_rank("ASCEND_RT_VISIBLE_DEVICES", 1, 2))
    except Exception as error:
        print(type(error).__name__)
print(utils.CoreEngineActorManager.__module__, core.EngineCoreActor.__module__)
"""
REFUSED = ["DeviceMappingError", "DeviceMappingError", "vllm_ray_ascend.engine.manager vllm_ray_ascend.engine.actors"]


@pytest.mark.parametrize(
    "order",
    [PLUGINS + OURS + PATCH + ENGINE, PLUGINS + PATCH + ENGINE + OURS, ENGINE + PLUGINS + OURS + PATCH],
    ids=["ours first", "ours last", "the engine first"],
)
def test_our_mapping_applies_in_every_order(order: str) -> None:
    assert _printed_lines(BEGIN + order + ASK) == REFUSED


def test_vllm_ascends_own_gives_two_ranks_the_same_npus() -> None:
    """Without us: what the first rank has too, [0, 1]. Engine cores over Ray have vLLM's own, an error of its own."""
    found = _printed_lines(BEGIN + PLUGINS + PATCH + ENGINE + OURS + ASK, VLLM_RAY_ASCEND="0")
    assert found == ["[0, 1]", "Exception", "vllm.v1.engine.utils vllm.v1.engine.core"]


def _printed_lines(code: str, **variables: str) -> list[str]:
    lines = check_python(code, **variables).splitlines()
    return [line for line in lines if not line.startswith(("INFO", "WARNING", "Warning"))]


SUPERVISOR = """
from argparse import Namespace
from vllm.entrypoints.launchers import dp_supervisor
for backend, given in (("ray", None), ("ray", [2, 3]), ("mp", None)):
    args = Namespace(
        port=8000, data_parallel_size=2, data_parallel_size_local=2, data_parallel_start_rank=None,
        tensor_parallel_size=2, pipeline_parallel_size=1, distributed_executor_backend=backend,
        data_parallel_backend="mp", device_ids=given, node_rank=0,
    )
    print(dp_supervisor._build_vllm_dp_server_args(args, 1).device_ids)
"""


def test_a_supervisor_of_servers_gives_those_over_ray_no_device_ids() -> None:
    """Our executor refuses --device-ids; what the user has given is passed on, and refused."""
    assert _printed_lines(BEGIN + PLUGINS + SUPERVISOR) == ["None", "[2, 3]", "[2, 3]"]
