"""The switches: defaults, values, and the error of a wrong one."""

from __future__ import annotations

import re
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.errors import SettingError
from vllm_ray_ascend.ipc.sockets import keep_alive
from vllm_ray_ascend.settings import VARIABLES, Settings, is_off, list_switches, load, unknown_variables

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
        ("VLLM_RAY_ASCEND_EXECUTOR", "mp", "ours, upstream, compiled_graph"),
        ("VLLM_RAY_ASCEND_NPU_WAIT_S", "-1", "a number from 0 to 604800"),
        ("VLLM_RAY_ASCEND_NPU_WAIT_S", "soon", "a number from 0 to 604800"),
    ],
)
def test_a_bad_value_names_variable_value_and_what_is_accepted(variable: str, value: str, accepted: str) -> None:
    with pytest.raises(SettingError) as raised:
        load({variable: value})
    assert raised.value.code == "VRA-141" and f"{variable}={value!r}" in str(raised.value)
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


NUMBERS = [name for name, field in VARIABLES.items() if isinstance(getattr(Settings(), field), float)]


@pytest.mark.parametrize("variable", NUMBERS)
@pytest.mark.parametrize("text", ["inf", "nan", "-inf", "1e9", "-1"])
def test_numbers_have_bounds(variable: str, text: str) -> None:
    with pytest.raises(SettingError, match=variable):
        load({variable: text})


@pytest.mark.parametrize("variable", NUMBERS)
def test_the_bounds_themselves_are_accepted_by_the_system(variable: str) -> None:
    (accepted,) = (switch.accepted for switch in list_switches({}) if switch.variable == variable)
    bounds = re.fullmatch(r"a number from (\d+) to (\d+)", accepted)
    assert bounds is not None
    for bound in bounds.groups():
        value: float = getattr(load({variable: bound}), VARIABLES[variable])
        assert value < threading.TIMEOUT_MAX and value * 1000 < 2**31
        if variable == "VLLM_RAY_ASCEND_SILENCE_S":
            with socket.socket() as connection:
                keep_alive(connection, value)


@given(st.text(max_size=4))
def test_only_0_is_off(text: str) -> None:
    assert is_off({"VLLM_RAY_ASCEND": text}) == (text == "0")


def test_every_switch_is_listed_with_its_meaning() -> None:
    listed = list_switches({"VLLM_RAY_ASCEND_EXECUTOR": "upstream"})
    assert {switch.variable for switch in listed} == set(VARIABLES)
    assert all(switch.meaning and switch.accepted for switch in listed)
    assert [switch.value for switch in listed if switch.variable == "VLLM_RAY_ASCEND_EXECUTOR"] == ["upstream"]


def test_misspelled_switches_are_found() -> None:
    assert unknown_variables(["VLLM_RAY_ASCEND_EXECUTER", "VLLM_PLUGINS", *VARIABLES]) == ["VLLM_RAY_ASCEND_EXECUTER"]
