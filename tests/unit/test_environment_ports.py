"""Port ranges of HCCL."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.environment.node import read_first_port
from vllm_ray_ascend.environment.ports import (
    FIRST_PORT,
    LAST_PORT,
    PORTS_PER_NPU,
    first_port_of_hccl,
    npu_port_variables,
    port_variables,
)

pytestmark = pytest.mark.unit

RANGE, NPU_RANGE, BASE = "HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_IF_BASE_PORT"
MOST = (LAST_PORT + 1 - FIRST_PORT) // PORTS_PER_NPU


def ports(physical_id: int) -> range:
    first, last = map(int, port_variables(physical_id, 1.0, {})[RANGE].split("-"))
    return range(first, last + 1)


def test_first_ranges() -> None:
    assert port_variables(0, 1.0, {}) == {RANGE: "61000-61063"}
    assert port_variables(7, 1.0, {}) == {RANGE: "61448-61511"}


@given(st.sets(st.integers(0, MOST - 1), min_size=2, max_size=2))
def test_ranges_of_different_npus_are_disjoint_and_above_outgoing_ports(pair: set[int]) -> None:
    one, other = map(ports, pair)
    assert not set(one) & set(other)
    assert all(60999 < port <= LAST_PORT for port in (*one, *other)) and len(one) == len(other) == PORTS_PER_NPU


def test_without_a_range_left_the_system_chooses() -> None:
    assert ports(MOST - 1)[-1] <= LAST_PORT
    assert port_variables(MOST, 1.0, {}) == {RANGE: "auto"}


def test_processes_that_share_an_npu_let_the_system_choose() -> None:
    assert port_variables(3, 0.5, {}) == {RANGE: "auto", NPU_RANGE: "auto"}
    assert port_variables(3, 0.5, {NPU_RANGE: "16666-16700"}) == {RANGE: "auto"}
    assert npu_port_variables(0.5, {}) == {NPU_RANGE: "auto"}
    assert npu_port_variables(0.5, {NPU_RANGE: "16666-16700"}) == npu_port_variables(1.0, {}) == {}


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("environ", [{BASE: "50000"}, {RANGE: "50000-50100"}])
def test_what_the_user_set_is_kept(share: float, environ: dict[str, str]) -> None:
    assert port_variables(0, share, environ) == npu_port_variables(share, environ)
    assert port_variables(0, share, environ, ranges=False) == {}
    assert port_variables(0, share, {**environ, NPU_RANGE: "16666-16700"}) == {}


@given(st.integers(0, 63), st.sampled_from([0.5, 1.0]))
def test_where_ranges_are_not_supported_all_have_the_same_base(physical_id: int, share: float) -> None:
    assert port_variables(physical_id, share, {}, ranges=False) == {BASE: "61000"}


@pytest.mark.parametrize(
    ("outgoing", "reserved", "first"),
    [
        ("32768\t60999\n", "\n", 61000),
        ("1024 50000", "", 61000),
        ("1024 61999", "", 62000),
        ("1024 65535", "", 65536),
        ("1024 65535", "8080,61000-65535", 61000),
        ("1024 65535", "63000-65535\n", 63000),
        ("1024 61001", "61001", 61001),
        ("", "", 61000),
        ("strange", "x", 61000),
    ],
)
def test_the_first_port_is_above_those_of_outgoing_connections(outgoing: str, reserved: str, first: int) -> None:
    """As the administrator has set them: a wider range for a busy proxy, or ports that are kept out of it."""
    assert first_port_of_hccl(outgoing, reserved) == first


def test_a_node_without_ports_above_leaves_the_choice_to_the_system() -> None:
    assert port_variables(0, 1.0, {}, first_port=65536) == {RANGE: "auto"}
    assert port_variables(1, 1.0, {}, first_port=62000) == {RANGE: "62064-62127"}


def test_this_node_has_a_first_port() -> None:
    assert FIRST_PORT <= read_first_port() <= LAST_PORT + 1
