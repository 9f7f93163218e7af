"""Which Ray cluster a driver joins, by what the user gives, what Ray has recorded and which raylets run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ray_ascend.cluster.ray_address import choose_address
from vllm_ray_ascend.compat.ray_processes import Raylet, local_raylets
from vllm_ray_ascend.errors import ClusterResourceError

pytestmark = pytest.mark.unit

HERE, OTHER = Raylet("10.0.0.1:6379", is_near=True), Raylet("10.0.0.2:6379", is_near=True)
IN_A_CONTAINER = Raylet("10.0.0.3:6379", is_near=False)


@pytest.mark.parametrize(
    ("given", "recorded", "raylets", "chosen"),
    [
        ("10.0.0.9:6379", None, [HERE], "10.0.0.9:6379"),
        ("auto", "10.0.0.1:6379", [HERE], "auto"),
        ("local", "10.0.0.1:6379", [HERE, OTHER], "local"),
        ("10.0.0.9:6379", None, [IN_A_CONTAINER], "10.0.0.9:6379"),
        (None, "10.0.0.1:6379", [HERE, OTHER], None),  # ray.init() joins what is recorded
        (None, None, [], None),  # nothing is here: a cluster of its own does no harm
        (None, None, [HERE, HERE], "10.0.0.1:6379"),
        (None, None, [HERE, IN_A_CONTAINER], "10.0.0.1:6379"),
        (None, None, [IN_A_CONTAINER], None),
    ],
)
def test_the_cluster_that_is_joined(
    given: str | None, recorded: str | None, raylets: list[Raylet], chosen: str | None
) -> None:
    assert choose_address(given, recorded, raylets, needs_local_raylet=True) == chosen


@pytest.mark.parametrize("address", ["ray://head:10001", "ray://10.0.0.1:10001", "ray://[fd00::1]:10001"])
def test_the_address_of_a_client_server_is_refused_with_the_right_one(address: str) -> None:
    host = address.removeprefix("ray://").removesuffix(":10001")
    with pytest.raises(ClusterResourceError, match="VRA-352") as raised:
        choose_address(address, None, [HERE], needs_local_raylet=True)
    assert f"RAY_ADDRESS={host}:6379 " in str(raised.value)


def test_a_machine_without_ray_is_asked_to_join() -> None:
    with pytest.raises(ClusterResourceError, match=r"VRA-353: .*ray start --address=head:6379"):
        choose_address("head:6379", None, [], needs_local_raylet=True)
    with pytest.raises(ClusterResourceError, match=r"VRA-353: .*ray start --address=HEAD:6379"):
        choose_address("auto", None, [], needs_local_raylet=True)
    assert choose_address("head:6379", None, [], needs_local_raylet=False) == "head:6379"


def test_two_clusters_leave_the_choice_to_the_user() -> None:
    with pytest.raises(ClusterResourceError, match=r"VRA-354: 2 .* \(10.0.0.1:6379, 10.0.0.2:6379\)"):
        choose_address(None, None, [OTHER, HERE], needs_local_raylet=True)


def test_raylets_are_found_by_their_command_lines(tmp_path: Path) -> None:
    add_process(tmp_path, "self", "pid:[1]", "python")
    add_process(tmp_path, "20", "pid:[1]", "/venv/ray/core/src/ray/raylet/raylet", "--gcs-address=10.0.0.1:6379", "-x")
    add_process(tmp_path, "3", "pid:[2]", "/ray/raylet/raylet", "--command=worker.py --gcs-address=[fd00::1]:6379 -y")
    add_process(tmp_path, "5", "pid:[1]", "grep", "/raylet", "--gcs-address=10.0.0.9:6379")
    add_process(tmp_path, "6", "pid:[1]", "/ray/raylet/raylet")
    (tmp_path / "7").mkdir()  # ended between two looks
    add_process(tmp_path, "30", "pid:[1]", "/ray/raylet", "--gcs-address=10.77.0.1:6379", network="net:[2]")
    assert local_raylets(tmp_path) == [
        Raylet("[fd00::1]:6379", False),
        Raylet("10.0.0.1:6379", True),
        Raylet("10.77.0.1:6379", False),
    ]


def add_process(proc: Path, pid: str, namespace: str, *command: str, network: str = "net:[1]") -> None:
    (proc / pid / "ns").mkdir(parents=True)
    (proc / pid / "ns" / "pid").symlink_to(namespace)
    (proc / pid / "ns" / "net").symlink_to(network)
    (proc / pid / "cmdline").write_bytes("\0".join(command).encode() + b"\0")
