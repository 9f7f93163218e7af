"""What a local cluster consists of, decided without touching the system."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softnpu.cluster.plan import (
    MARKER,
    Cluster,
    Shape,
    check_name,
    check_visible,
    choose_subnet,
    describe_difference,
    hosts_file,
    make_cluster,
    make_shape,
    node_environment,
    parse_npus,
    ray_start_command,
)
from softnpu.errors import ClusterError

SUBNET = ipaddress.IPv4Network("10.77.5.0/24")
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,11}", fullmatch=True)


def plan(name: str = "demo", uid: int = 0, **shape: object) -> Cluster:
    asked = Shape(**shape)  # type: ignore[arg-type]
    subnet = SUBNET if asked.kind == "namespaces" else None
    return make_cluster(name, uid, asked, Path(f"/tmp/snpu-{uid}") / name, subnet, gcs_port=6379)


def test_nodes_have_their_own_addresses_and_the_head_is_first() -> None:
    cluster = plan(nodes=3)
    assert [node.address for node in cluster.nodes] == ["10.77.5.1", "10.77.5.2", "10.77.5.3"]
    assert [node.hostname for node in cluster.nodes] == ["demo-1", "demo-2", "demo-3"]
    assert cluster.gateway == "10.77.5.254"
    assert cluster.ray_address == "10.77.5.1:6379"


@given(name=names, nodes=st.integers(1, 200), uid=st.integers(0, 99_999))
def test_interface_names_fit_and_differ(name: str, nodes: int, uid: int) -> None:
    cluster = plan(name, uid, nodes=nodes)
    links = [cluster.bridge, *(node.link for node in cluster.nodes)]
    assert len(set(links)) == len(links)
    assert max(map(len, links)) <= 15


@given(name=names, kind=st.sampled_from(["namespaces", "plain"]), nodes=st.integers(1, 9))
def test_a_plan_survives_the_state_file(name: str, kind: str, nodes: int) -> None:
    cluster = plan(name, nodes=nodes, kind=kind)
    assert Cluster.from_json(cluster.to_json()) == cluster


def test_clusters_of_two_users_share_nothing() -> None:
    mine, theirs = plan(uid=0), plan(uid=1000)
    assert mine.token != theirs.token
    assert mine.bridge != theirs.bridge


def test_socket_paths_fit() -> None:
    cluster = plan("a" * 20)
    longest = f"{cluster.temp_dir(cluster.nodes[0])}/session_2026-11-21_06-09-05_388213_4194304/sockets/plasma_store.1"
    assert len(longest) <= 107
    with pytest.raises(ClusterError, match=r"at most \d+ characters"):
        plan("a" * 20, uid=10_000_000)


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "..", "-a", "a" * 21, "a b"])
def test_names_that_cannot_be_files_or_hosts_are_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="--name"):
        check_name(name)


def test_the_same_name_gets_the_same_network() -> None:
    assert choose_subnet("default", []) == ipaddress.IPv4Network("10.77.0.0/24")
    assert choose_subnet("tests", []) == choose_subnet("tests", ["192.168.0.0/16"])


@given(name=names, taken=st.lists(st.integers(0, 255), max_size=255, unique=True))
def test_a_chosen_network_is_free(name: str, taken: list[int]) -> None:
    used = [f"10.77.{k}.0/24" for k in taken]
    assert str(choose_subnet(name, used)) not in used


def test_no_network_left() -> None:
    with pytest.raises(ClusterError, match="--subnet"):
        choose_subnet("demo", ["10.0.0.0/8"])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("10.1.2.3", "too small"),
        ("here", "not an IPv4 network"),
        ("10.1.2.3/24", "host bits"),
        ("10.9.0.0/24", "overlaps"),
    ],
)
def test_a_wanted_network_is_checked(wanted: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        choose_subnet("demo", ["10.9.0.0/16"], wanted)


@pytest.mark.parametrize(
    "wrong", [{"nodes": 0}, {"nodes": 201}, {"npus_per_node": 0}, {"cpus_per_node": -1}, {"memory": "1T"}]
)
def test_shapes_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ClusterError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        Shape(**wrong)  # type: ignore[arg-type]


def test_nodes_with_different_numbers_of_npus() -> None:
    """A head without any, as on a machine without a card; the state file keeps it."""
    shape = make_shape(3, parse_npus("0,2,4"), 2, "1G", "namespaces")
    assert (shape.npus_per_node, [shape.npus(index) for index in (1, 2, 3)]) == (4, [0, 2, 4])
    cluster = make_cluster("demo", 0, shape, Path("/tmp/x"), None, 1)
    assert Cluster.from_json(json.loads(json.dumps(cluster.to_json()))) == cluster
    assert [node_environment(cluster, node, {})["SOFTNPU_DEVICES"] for node in cluster.nodes] == ["0", "2", "4"]
    assert describe_difference(shape, Shape(3, 4, 2)) == "npus of nodes (0, 2, 4), not ()"
    assert make_shape(2, parse_npus("3"), 2, "1G", "plain") == Shape(2, 3, 2, kind="plain")
    for wrong in ("1,2", "0,0,0", "1,-1,1"):
        with pytest.raises(ClusterError, match="--npus-per-node"):
            make_shape(3, parse_npus(wrong), 2, "1G", "plain")


@pytest.mark.parametrize("visible", [None, "0,1,2,3", "3", "", "2,0"])
def test_visible_lists_that_a_node_can_honour(visible: str | None) -> None:
    check_visible(visible, 4, "demo-1")


@pytest.mark.parametrize("visible", ["4", "0,9", "a", "-1", "0,0"])
def test_visible_lists_that_name_no_device(visible: str) -> None:
    with pytest.raises(ClusterError, match=r"ASCEND_RT_VISIBLE_DEVICES.*demo-1.*0 to 3"):
        check_visible(visible, 4, "demo-1")


def test_the_head_starts_the_control_store_and_others_join_it() -> None:
    cluster = plan()
    head, other = (ray_start_command(["ray"], cluster, node) for node in cluster.nodes)
    assert {"--head", "--port=6379", "--node-ip-address=10.77.5.1"} <= set(head)
    assert {"--address=10.77.5.1:6379", "--node-ip-address=10.77.5.2"} <= set(other)
    assert "--head" not in other
    assert "--include-dashboard=false" in head

    cluster = plan(dashboard=True)
    head, other = (ray_start_command(["ray"], cluster, node) for node in cluster.nodes)
    assert {"--include-dashboard=true", "--dashboard-host=10.77.5.1"} <= set(head)
    assert not any("dashboard" in option for option in other)
    assert Cluster.from_json(cluster.to_json()) == cluster
    for node in cluster.nodes:
        assert node_environment(cluster, node, {})["RAY_DASHBOARD_ADDRESS"] == "http://10.77.5.1:8265"


def test_a_node_s_environment() -> None:
    cluster = plan(npus_per_node=4, memory="512M")
    environment = node_environment(cluster, cluster.nodes[1], {"PATH": "/bin", "RAY_AUTH_MODE": "token"})
    assert environment["PATH"] == "/bin"
    assert environment["SOFTNPU_DEVICES"] == "4"
    assert environment["SOFTNPU_MEMORY"] == "512M"
    assert environment["SOFTNPU_NODE"] == "demo-2"
    assert environment["RAY_ADDRESS"] == "10.77.5.1:6379"
    assert environment["RAY_AUTH_MODE"] == "token", "what the user set stays"
    assert environment[MARKER] == cluster.token
    assert "RAY_DASHBOARD_ADDRESS" not in environment
    assert environment["SOFTNPU_STATE_DIR"] == "/dev/shm", "which each such node has for itself"


def test_nodes_without_namespaces_keep_their_state_where_down_finds_it() -> None:
    cluster = plan(kind="plain")
    assert {node.address for node in cluster.nodes} == {"127.0.0.1"}
    assert node_environment(cluster, cluster.nodes[0], {})["SOFTNPU_STATE_DIR"] == "/dev/shm/softnpu-0-demo"


def test_hosts_know_each_other() -> None:
    assert "10.77.5.2 demo-2\n" in hosts_file(plan())


def test_differences_are_named() -> None:
    assert describe_difference(Shape(), Shape()) == ""
    assert describe_difference(Shape(nodes=3, memory="2G"), Shape()) == "nodes 3, not 2; memory 2G, not 1G"
