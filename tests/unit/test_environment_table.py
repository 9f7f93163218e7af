"""Which variables stay on their node, and which a worker needs early."""

from __future__ import annotations

import pytest

from vllm_ray_ascend.environment.table import NODE, early_variables, of_the_node

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "name",
    [
        "ASCEND_RT_VISIBLE_DEVICES",
        "HCCL_IF_IP",
        "HCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "TP_SOCKET_IFNAME",
        "HCCL_IF_BASE_PORT",
        "RANK_TABLE_FILE",
        "ASCEND_LOCAL_COMM_RES",
        "LD_LIBRARY_PATH",
        "SOFTNPU_NODE",
        "SOFTNPU_DEVICES",
    ],
)
def test_a_variable_of_the_node_stays(name: str) -> None:
    assert of_the_node([name]) == {name}


@pytest.mark.parametrize(
    "name",
    ["HCCL_CONNECT_TIMEOUT", "HCCL_OP_EXPANSION_MODE", "HCCL_BUFFSIZE", "VLLM_PLUGINS", "OMP_NUM_THREADS"],
)
def test_a_uniform_variable_travels(name: str) -> None:
    assert of_the_node([name]) == set()


def test_each_has_a_reason() -> None:
    assert all(NODE.values())


def test_early_are_the_choice_of_plugins_and_our_switches_as_far_as_set() -> None:
    environ = {"VLLM_PLUGINS": "ray_ascend", "VLLM_RAY_ASCEND": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "SOFTNPU_NODE": "a"}
    assert early_variables(environ) == {"VLLM_PLUGINS": "ray_ascend", "VLLM_RAY_ASCEND": "1"}
    assert early_variables({}) == {}
