"""Port windows of HCCL."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ray_ascend.environment.ports import FIRST, LAST, WINDOW, port_variables

pytestmark = pytest.mark.unit

RANGE, NPU_RANGE, BASE = "HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_IF_BASE_PORT"
MOST = (LAST + 1 - FIRST) // WINDOW


def ports(physical: int) -> range:
    first, last = map(int, port_variables(physical, 1.0, {})[RANGE].split("-"))
    return range(first, last + 1)


def test_first_windows() -> None:
    assert port_variables(0, 1.0, {}) == {RANGE: "61000-61063"}
    assert port_variables(7, 1.0, {}) == {RANGE: "61448-61511"}


@given(st.sets(st.integers(0, MOST - 1), min_size=2, max_size=2))
def test_windows_of_different_npus_are_disjoint_and_above_outgoing_ports(pair: set[int]) -> None:
    one, other = map(ports, pair)
    assert not set(one) & set(other)
    assert all(60999 < port <= LAST for port in (*one, *other)) and len(one) == len(other) == WINDOW


def test_without_a_window_left_the_system_chooses() -> None:
    assert ports(MOST - 1)[-1] <= LAST
    assert port_variables(MOST, 1.0, {}) == {RANGE: "auto"}


def test_processes_that_share_an_npu_let_the_system_choose() -> None:
    assert port_variables(3, 0.5, {}) == {RANGE: "auto", NPU_RANGE: "auto"}
    assert port_variables(3, 0.5, {NPU_RANGE: "16666-16700"}) == {RANGE: "auto"}


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("environ", [{BASE: "50000"}, {RANGE: "50000-50100"}])
def test_what_the_user_set_stands(share: float, environ: dict[str, str]) -> None:
    assert port_variables(0, share, environ) == port_variables(0, share, environ, ranges=False) == {}


@given(st.integers(0, 63), st.sampled_from([0.5, 1.0]))
def test_where_ranges_are_not_supported_all_have_the_same_base(physical: int, share: float) -> None:
    assert port_variables(physical, share, {}, ranges=False) == {BASE: "61000"}
