"""The scope of each variable, and which variables a worker needs early."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.environment.table import (
    DRIVER_VARIABLE,
    TABLE,
    early_variables,
    find_variable,
    kept_prefixes_warning,
    names_copied_on_request,
    names_kept_on_node,
    names_to_copy,
    scope_of,
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
COPIED = [
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
def test_a_variable_of_the_node_is_not_copied(name: str) -> None:
    assert scope_of(name) == "node" and names_kept_on_node([name]) == {name} and names_to_copy([name]) == set()


@pytest.mark.parametrize("name", COPIED)
def test_a_variable_of_the_engine_is_copied(name: str) -> None:
    assert scope_of(name) == "copied" and names_kept_on_node([name]) == set() and names_to_copy([name]) == {name}


@pytest.mark.parametrize("name", COPIED_BY_VLLM)
def test_what_vllm_copies_is_not_copied_again(name: str) -> None:
    assert scope_of(name) == "copied" and names_to_copy([name]) == set()


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_recognised_by_its_name(name: str) -> None:
    assert scope_of(name) == "secret" and names_to_copy([name]) == set()


@pytest.mark.parametrize("name", OTHERS)
def test_other_variables_are_unknown(name: str) -> None:
    assert scope_of(name) == "other" and find_variable(name) is None


@pytest.mark.parametrize("name", ["VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD"])
def test_counts_of_tokens_are_not_secrets(name: str) -> None:
    assert scope_of(name) == "copied"


def test_each_has_a_meaning_and_one_scope() -> None:
    assert all(entry.meaning and entry.name == name == name.strip() for name, entry in TABLE.items())
    assert {entry.scope for entry in TABLE.values()} == {"node", "copied"}


@given(st.lists(st.sampled_from(NODE + COPIED + SECRETS + OTHERS) | st.text()))
def test_no_variable_both_stays_and_is_copied(names: list[str]) -> None:
    assert not names_kept_on_node(names) & names_to_copy(names)


def test_the_user_can_have_a_variable_of_the_node_copied_but_not_the_list_of_devices() -> None:
    wanted = names_copied_on_request(
        {"VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": " HCCL_SOCKET_IFNAME,, ASCEND_RT_VISIBLE_DEVICES "}
    )
    assert wanted == {"HCCL_SOCKET_IFNAME", "ASCEND_RT_VISIBLE_DEVICES"} and names_copied_on_request({}) == set()
    names = ["HCCL_SOCKET_IFNAME", "HCCL_IF_IP", "ASCEND_RT_VISIBLE_DEVICES"]
    assert names_kept_on_node(names, wanted) == {"HCCL_IF_IP", "ASCEND_RT_VISIBLE_DEVICES"}


def test_early_variables_are_the_set_ones_of_plugins_and_switches() -> None:
    environ = {"VLLM_PLUGINS": "ray_ascend", "VLLM_RAY_ASCEND": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "SOFTNPU_NODE": "a"}
    assert early_variables(environ) == {"VLLM_PLUGINS": "ray_ascend", "VLLM_RAY_ASCEND": "1"}
    assert early_variables({}) == {}


@pytest.mark.parametrize(
    ("prefixes", "matched"),
    [("HCCL_", "HCCL_IF_IP, HCCL_SOCKET_IFNAME"), ("HCCL_IF, OTHER_", "HCCL_IF_IP"), ("VLLM_", ""), ("", "")],
)
def test_a_prefix_does_not_copy_variables_of_the_node(prefixes: str, matched: str) -> None:
    """It is said, with the setting that copies them: plain vLLM would give every node the driver's address."""
    environ = {
        "HCCL_IF_IP": "10.0.0.1",
        "HCCL_SOCKET_IFNAME": "eth0",
        "HCCL_BUFFSIZE": "200",
        "VLLM_HOST_IP": "10.0.0.1",
        "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": prefixes,
    }
    warning = kept_prefixes_warning(environ)
    assert (warning is None) == (not matched)
    if warning:
        assert f"matches {matched}, which stay on" in warning
        named = {**environ, "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": matched.replace(" ", "")}
        assert kept_prefixes_warning(named) is None
