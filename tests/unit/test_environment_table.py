"""Whose each variable is, and which a worker needs early."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.environment.table import (
    DRIVER_VARIABLE,
    TABLE,
    belongs,
    early_variables,
    find,
    of_the_node,
    on_request,
    travelling,
)

pytestmark = pytest.mark.unit

NODE = [
    "ASCEND_RT_VISIBLE_DEVICES",
    "HCCL_IF_IP",
    "HCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
    "HCCL_IF_BASE_PORT",
    "HCCL_HOST_SOCKET_PORT_RANGE",
    "HCCL_NPU_SOCKET_PORT_RANGE",
    "RANK_TABLE_FILE",
    "ASCEND_LOCAL_COMM_RES",
    "ASCEND_HOME_PATH",
    "VLLM_HOST_IP",
    "LD_LIBRARY_PATH",
    "SOFTNPU_NODE",
    "SOFTNPU_DEVICES",
]
TRAVELS = [
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_OP_EXPANSION_MODE",
    "HCCL_BUFFSIZE",
    "HCCL_SOMETHING_NEW",
    "TASK_QUEUE_ENABLE",
    "PYTORCH_NPU_ALLOC_CONF",
    "TORCH_HCCL_ZERO_COPY",
    "ATB_MATMUL_SHUFFLE_K_ENABLE",
    "ASCEND_GLOBAL_LOG_LEVEL",
    "OMP_NUM_THREADS",
    DRIVER_VARIABLE,
]
COPIED_BY_VLLM = ["VLLM_PLUGINS", "VLLM_ASCEND_ENABLE_NZ", "VLLM_RAY_ASCEND"]
SECRETS = [
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "VLLM_API_KEY",
    "OPENAI_APIKEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "PGPASSWORD",
    "MYSQL_PWD",
    "GOOGLE_CREDENTIALS",
    "SSH_PRIVATE_KEY",
    "github_token",
    "HCCL_SECRET",
]
OTHERS = ["PATH", "HOME", "PWD", "HOSTNAME", "TOKENIZERS_PARALLELISM", "HF_HOME", "SSH_AUTH_SOCK", "HTTP_PROXY"]


@pytest.mark.parametrize("name", NODE)
def test_a_variable_of_the_node_stays(name: str) -> None:
    assert belongs(name) == "node" and of_the_node([name]) == {name} and travelling([name]) == set()


@pytest.mark.parametrize("name", TRAVELS)
def test_a_uniform_variable_travels(name: str) -> None:
    assert belongs(name) == "travels" and of_the_node([name]) == set() and travelling([name]) == {name}


@pytest.mark.parametrize("name", COPIED_BY_VLLM)
def test_what_vllm_copies_travels_without_our_doing(name: str) -> None:
    assert belongs(name) == "travels" and travelling([name]) == set()


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_told_by_its_name(name: str) -> None:
    assert belongs(name) == "secret" and travelling([name]) == set()


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_said_of_others(name: str) -> None:
    assert belongs(name) == "other" and find(name) is None


@pytest.mark.parametrize("name", ["VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD"])
def test_counts_of_tokens_are_no_secrets(name: str) -> None:
    assert belongs(name) == "travels"


def test_each_has_a_meaning_and_one_owner() -> None:
    assert all(entry.meaning and entry.name == name == name.strip() for name, entry in TABLE.items())
    assert {entry.belongs for entry in TABLE.values()} == {"node", "travels"}


@given(st.lists(st.sampled_from(NODE + TRAVELS + SECRETS + OTHERS) | st.text()))
def test_no_variable_both_stays_and_travels(names: list[str]) -> None:
    assert not of_the_node(names) & travelling(names)


def test_the_user_can_have_a_variable_of_the_node_copied_but_not_the_list_of_devices() -> None:
    wanted = on_request({"VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": " HCCL_SOCKET_IFNAME,, ASCEND_RT_VISIBLE_DEVICES "})
    assert wanted == {"HCCL_SOCKET_IFNAME", "ASCEND_RT_VISIBLE_DEVICES"} and on_request({}) == set()
    names = ["HCCL_SOCKET_IFNAME", "HCCL_IF_IP", "ASCEND_RT_VISIBLE_DEVICES"]
    assert of_the_node(names, wanted) == {"HCCL_IF_IP", "ASCEND_RT_VISIBLE_DEVICES"}


def test_early_are_the_choice_of_plugins_and_our_switches_as_far_as_set() -> None:
    environ = {"VLLM_PLUGINS": "ray_ascend", "VLLM_RAY_ASCEND": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "SOFTNPU_NODE": "a"}
    assert early_variables(environ) == {"VLLM_PLUGINS": "ray_ascend", "VLLM_RAY_ASCEND": "1"}
    assert early_variables({}) == {}
