"""The switches: defaults, values, and what a wrong one says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.errors import SettingError
from vllm_ray_ascend.settings import VARIABLES, Settings, is_off, load, switches, unknown

pytestmark = pytest.mark.unit


def test_nothing_set_gives_the_defaults() -> None:
    assert load({}) == Settings(
        active="auto",
        executor="ours",
        npu_wait_s=10.0,
        worker_limit_s=300.0,
        device_limit_s=600.0,
        load_limit_s=7200.0,
        warm_up_limit_s=3600.0,
        hang_s=0.0,
        silence_s=30.0,
        stop_grace_s=3.0,
        transfer_limit_s=0.0,
        node_env="derive",
    )


def test_an_empty_value_counts_as_unset() -> None:
    assert load(dict.fromkeys(VARIABLES, "")) == Settings()


def test_values_are_read() -> None:
    environ = {"VLLM_RAY_ASCEND": "1", "VLLM_RAY_ASCEND_EXECUTOR": "upstream", "VLLM_RAY_ASCEND_NPU_WAIT_S": "2.5"}
    assert load(environ) == Settings(active="1", executor="upstream", npu_wait_s=2.5)


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("VLLM_RAY_ASCEND", "yes", "auto, 0, 1"),
        ("VLLM_RAY_ASCEND", "0 ", "auto, 0, 1"),
        ("VLLM_RAY_ASCEND_EXECUTOR", "mp", "ours, upstream"),
        ("VLLM_RAY_ASCEND_NPU_WAIT_S", "-1", "a number, 0 or more"),
        ("VLLM_RAY_ASCEND_NPU_WAIT_S", "soon", "a number, 0 or more"),
    ],
)
def test_a_bad_value_names_variable_value_and_what_is_accepted(variable: str, value: str, accepted: str) -> None:
    with pytest.raises(SettingError) as raised:
        load({variable: value})
    assert f"{variable}={value!r}" in str(raised.value)
    assert f"Accepted: {accepted}." in str(raised.value)


@given(st.sampled_from(sorted(VARIABLES)), st.text(max_size=8))
def test_any_text_is_a_value_or_a_setting_error(variable: str, text: str) -> None:
    try:
        load({variable: text})
    except SettingError as error:
        message = str(error)
    else:
        return
    assert variable in message


@given(st.text(max_size=4))
def test_only_0_is_off(text: str) -> None:
    assert is_off({"VLLM_RAY_ASCEND": text}) == (text == "0")


def test_every_switch_is_listed_with_its_meaning() -> None:
    listed = switches({"VLLM_RAY_ASCEND_EXECUTOR": "upstream"})
    assert {switch.variable for switch in listed} == set(VARIABLES)
    assert all(switch.meaning and switch.accepted for switch in listed)
    assert [switch.value for switch in listed if switch.variable == "VLLM_RAY_ASCEND_EXECUTOR"] == ["upstream"]


def test_misspelt_switches_are_found() -> None:
    assert unknown(["VLLM_RAY_ASCEND_EXECUTER", "VLLM_PLUGINS", *VARIABLES]) == ["VLLM_RAY_ASCEND_EXECUTER"]
