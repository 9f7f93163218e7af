"""The hosts: limits, shared memory, names, clocks, ports, and variables that must be equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from vllm_ray_ascend.addresses import canonical, is_loopback
from vllm_ray_ascend.cluster.findings import Finding, join
from vllm_ray_ascend.doctor.host_addresses import HostAddress, carried_addresses, host_addresses, is_same_host
from vllm_ray_ascend.doctor.queries import ENGINES, ROUTES
from vllm_ray_ascend.doctor.views import Check, NodeView, odd_ones, on_every_node, on_several_nodes
from vllm_ray_ascend.environment.derive import interface_with_address
from vllm_ray_ascend.environment.ports import LAST_PORT, PORTS_PER_NPU
from vllm_ray_ascend.environment.table import scope_of
from vllm_ray_ascend.settings import variable_of

_GIB = 1 << 30
_FILES = 4096
_LOCKED = 1 << 20
_SKEW_S = 1.0
_AUTH_MODE, _NO_AUTH = "RAY_AUTH_MODE", "disabled"
_PORT_SETTINGS = ("HCCL_IF_BASE_PORT", "HCCL_HOST_SOCKET_PORT_RANGE")
_NPU_PORTS = "HCCL_NPU_SOCKET_PORT_RANGE"
_NAMED = 3
_NODE_ENV = variable_of("node_env")


def check_limits(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each limit of the raylet, which workers inherit, that is too low."""
    files, locked = node.record.limits.get("Max open files"), node.record.limits.get("Max locked memory")
    if files is None or locked is None:
        yield node.unknown("the limits of Ray's raylet cannot be read", "`cat /proc/PID/limits` of the raylet there.")
        return
    if files.soft is not None and files.soft < _FILES:
        yield node.finding(
            "warning",
            "VRA-670",
            f"Ray's raylet may open {files.soft} files; its workers need a socket for each rank and more.",
            "`ulimit -n 65536` before `ray start` there, or `docker run --ulimit nofile=65536`.",
            soft=files.soft,
        )
    if locked.soft is not None and locked.soft < _LOCKED:
        yield node.finding(
            "warning",
            "VRA-671",
            f"Ray's raylet may lock {locked.soft >> 10} KiB of memory; pinned memory for NPUs needs more.",
            "`ulimit -l unlimited` before `ray start` there, or `docker run --ulimit memlock=-1`.",
            soft=locked.soft,
        )


def check_shared_memory(node: NodeView) -> Iterator[Finding]:
    """Yield an error where /dev/shm is as small as Docker makes it, a warning where little of it is free."""
    found = node.record.shared_memory
    if found is None:
        yield node.unknown("/dev/shm cannot be read", "`df -h /dev/shm` there.")
    elif found.total < _GIB:
        yield node.finding(
            "error",
            "VRA-672",
            f"/dev/shm has {found.total >> 20} MiB: Ray's objects and vLLM's message queues do not fit.",
            "`docker run --shm-size=16g`, or a volume of medium Memory in Kubernetes.",
            total=found.total,
        )
    elif found.free < min(_GIB, found.total // 4):
        yield node.finding(
            "warning",
            "VRA-673",
            f"{found.free >> 20} of {found.total >> 20} MiB of /dev/shm are free.",
            "`ls -l /dev/shm` there shows what is in it; files of processes that are gone may be deleted.",
            free=found.free,
        )


def check_name(node: NodeView) -> Iterator[Finding]:
    """Yield a warning where the node's name is a loopback address, which gloo then gives to other nodes.

    Only where VLLM_RAY_ASCEND_NODE_ENV is off: else the interface is derived from Ray's address.
    """
    loopback = [address for address in node.record.own_addresses if is_loopback(address)]
    environment = node.record.environment
    if loopback and environment.get(_NODE_ENV) == "off" and not environment.get("GLOO_SOCKET_IFNAME"):
        yield node.finding(
            "warning",
            "VRA-674",
            f"its name {node.record.facts.hostname} is the loopback address {loopback[0]}, {_NODE_ENV} is off, and "
            "GLOO_SOCKET_IFNAME is not set: gloo gives other nodes an address that they cannot reach.",
            f"`unset {_NODE_ENV}` before `ray start` there, or correct /etc/hosts.",
            addresses=loopback,
        )


def check_clock(node: NodeView) -> Iterator[Finding]:
    """Yield a warning where the node's clock cannot be that of the driver: it began before, or ended after."""
    if node.ray is None:
        return
    behind, ahead = node.ray.sent - node.record.started, node.record.ended - node.ray.received
    skew = max(behind, ahead)
    if skew > _SKEW_S:
        yield node.finding(
            "warning",
            "VRA-675",
            f"its clock is at least {skew:.1f} s {'behind' if behind > ahead else 'ahead of'} that of this node: logs "
            "of nodes cannot be compared, and tokens may be refused.",
            "`sudo chronyc makestep`, or `sudo timedatectl set-ntp true`, there.",
            seconds=round(skew, 1),
        )


def check_reachable(node: NodeView) -> Iterator[Finding]:
    """Yield an error for each node whose raylet cannot be connected to."""
    for peer, reason in node.record.unreachable.items():
        yield node.finding(
            "error",
            "VRA-676",
            f"it cannot connect to Ray on node {peer} ({reason}).",
            "Open all TCP ports between the nodes (firewall, security group); check routes and HCCL's interface.",
            peer=peer,
            reason=reason,
        )


def check_ports(node: NodeView) -> Iterator[Finding]:
    """Yield a warning where something has HCCL's ports, though Ray has given no NPU of the node to anybody."""
    listening, (first, last) = node.record.listening_ports, _hccl_ports(node)
    if listening is None:
        yield node.unknown("/proc/net/tcp cannot be read", "`ss -ltn` there.")
    elif node.is_idle and (taken := [port for port in listening if first <= port <= last]):
        holders = dict.fromkeys(node.record.port_holders.get(port, "something") for port in taken)
        yield node.finding(
            "warning",
            "VRA-677",
            f"{join(holders)} listens on {', '.join(map(str, taken[:5]))}, among HCCL's "
            f"ports {first} to {last}, and Ray has given no NPU of the node to anybody.",
            f"`sudo ss -ltnp 'sport = :{taken[0]}'` there shows who does; end it, or `export "
            "HCCL_HOST_SOCKET_PORT_RANGE=auto` before `ray start` on all nodes.",
            ports=taken,
        )


def check_worker_ports(node: NodeView) -> Iterator[Finding]:
    """Yield a warning where Ray gives its workers ports of HCCL."""
    workers, (first, last) = node.record.worker_ports, _hccl_ports(node)
    if workers and workers[0] <= last and first <= workers[1]:
        yield node.finding(
            "warning",
            "VRA-682",
            f"Ray's workers get the ports {workers[0]} to {workers[1]}, among them HCCL's, {first} to {last}.",
            f"Give `ray start` there a range that ends below: --max-worker-port={first - 1}.",
            workers=list(workers),
        )


def _hccl_ports(node: NodeView) -> tuple[int, int]:
    """Return the first and the last port that engines give HCCL; an empty range where the user has set other ones."""
    first = node.record.first_port
    if any(node.record.environment.get(name) for name in _PORT_SETTINGS):
        return first, first - 1
    return first, min(first + len(node.dies) * PORTS_PER_NPU - 1, LAST_PORT)


def check_npu_ports(node: NodeView) -> Iterator[Finding]:
    """Yield a warning for each NPU that engines share without a range of ports on it: each process takes port 16666.

    The plugin sets a range for them, unless it is to set nothing.
    """
    environment = node.record.environment
    if node.ray is None or environment.get(_NPU_PORTS) or environment.get(_NODE_ENV) != "off":
        return
    if node.ray.shared_physical_ids is None:
        yield node.unknown("Ray does not say which engines run", "`vllm-ray-ascend topology` says why.")
    for die in node.dies:
        if die.physical_id in (node.ray.shared_physical_ids or ()):
            yield node.finding(
                "warning",
                "VRA-687",
                f"ranks of engines share it, and {_NODE_ENV}=off is set where Ray was started there without "
                f"{_NPU_PORTS}: the processes of an NPU all take its port 16666, and the second one fails (EI0019).",
                f"`export {_NPU_PORTS}=auto` before `ray start` there.",
                die,
                variable=_NPU_PORTS,
            )


def check_host_interface(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield a finding for each interface of a host that is not there, or by which other nodes are not reached.

    Judged are the addresses that nodes use for HCCL, gloo and vLLM, those of Ray where no variable names others.
    """
    found = {node: host_addresses(node.record) for node in nodes}
    for node in nodes:
        users: defaultdict[HostAddress, list[str]] = defaultdict(list)
        for user, chosen in found[node].items():
            users[chosen].append(user)
        for chosen, names in users.items():
            if not node.record.interfaces:
                yield node.unknown("its interfaces are not known", "Install this vllm-ray-ascend there too.")
            elif chosen.interface:
                yield from _judge_routes(node, chosen, join(names), _peers(node, found, names))
            elif not chosen.variable:
                yield _no_interface(node)
            else:
                listed = join(f"{name} {address}" for name, address in node.record.interfaces)
                yield node.finding(
                    "error",
                    "VRA-683",
                    f"{chosen}, for {join(names)}, selects none of its interfaces: {listed}.",
                    f"`unset {chosen.variable}` before `ray start` there, which leaves it to be derived; or name one "
                    "that is there.",
                    variable=chosen.variable,
                )


def _peers(node: NodeView, found: Mapping[NodeView, Mapping[str, HostAddress]], users: Sequence[str]) -> dict[str, str]:
    """Return the addresses that nodes on other hosts have for the same purposes, each with its node."""
    carried = carried_addresses(node.record)
    return {
        chosen[user].address: other.address
        for other, chosen in found.items()
        if not is_same_host(node.record, carried, other.record)
        for user in users
        if user in chosen and chosen[user].is_target
    }


def _judge_routes(node: NodeView, chosen: HostAddress, users: str, peers: Mapping[str, str]) -> Iterator[Finding]:
    """Yield findings of the ways from a node to addresses of ``peers``; ``users`` are HCCL, gloo or vLLM."""
    routes, carried = node.record.routes, carried_addresses(node.record)
    sources = {route.source for route in routes.values() if route.source}
    interfaces = {source: interface_with_address(source, node.record.interfaces) or "" for source in sources}
    same = [address for address in peers if canonical(address) in carried]
    unknown = [address for address in peers if address not in same and address not in routes]
    leaving: defaultdict[str, list[str]] = defaultdict(list)
    for address in peers:
        if address in same or address in unknown:
            continue
        interface = routes[address].leaving.get(chosen.address) or interfaces.get(routes[address].source, "")
        if interface:
            leaving[_without_label(interface)].append(address)
        elif error := routes[address].error:
            yield node.finding(
                "error",
                "VRA-684",
                f"it has no route to {address}, which node {peers[address]} uses for {users} ({error}).",
                f"`ip route get {address}` there; add the route, or choose another interface on both nodes.",
                address=address,
            )
    leaving.pop(_without_label(chosen.interface), None)
    if same:
        yield node.finding(
            "error",
            "VRA-685",
            f"{same[0]}, which node {peers[same[0]]} uses for {users}, is an address of this node as well: the two "
            "never meet.",
            "`ip -brief address` on both; choose an interface that connects them (Docker's bridge has one address on "
            "all hosts), or none: `unset HCCL_IF_IP HCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME VLLM_HOST_IP` before `ray "
            "start`.",
            address=same[0],
        )
    for interface, addresses in leaving.items():
        yield node.finding(
            "warning",
            "VRA-686",
            f"{chosen}, for {users}, is on {chosen.interface}, and the route to {_some(addresses)} leaves by "
            f"{interface}.",
            f"`ip route get {addresses[0]} from {chosen.address}` there; correct the route, or choose {interface} "
            f"before `ray start`, by {chosen.variable or 'HCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME'}.",
            here=chosen.interface,
            route=interface,
        )
    if unknown:
        yield node.unknown(
            f"its routes to {_some(unknown)} are not known ({node.record.routes_error or 'they were not looked up'})",
            f"`ip route get {unknown[0]}` there.",
        )


def _without_label(interface: str) -> str:
    """Return the interface that a name means: eth0:1 is a second address of eth0."""
    return interface.partition(":")[0]


def _some(values: Sequence[str]) -> str:
    return f"{join(values[:_NAMED])}{f' and {len(values) - _NAMED} more' if len(values) > _NAMED else ''}"


_AGREED = frozenset(
    {
        "HCCL_ALGO",
        "HCCL_BUFFSIZE",
        "HCCL_DETERMINISTIC",
        "HCCL_INTRA_PCIE_ENABLE",
        "HCCL_INTRA_ROCE_ENABLE",
        "HCCL_OP_EXPANSION_MODE",
        "HCCL_SOCKET_FAMILY",
    }
)
"""By which ranks choose the same algorithms and connections."""


def check_same_variables(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield a finding for each variable of HCCL that differs: an error where all ranks have to agree on it."""
    names = {name for node in nodes for name in node.record.environment if name.startswith("HCCL_")}
    for name in sorted(names):
        if scope_of(name) != "copied":
            continue
        found = {node: node.record.environment.get(name) for node in nodes}
        for node, value, example, usual in odd_ones(found):
            must_agree = name in _AGREED
            yield node.finding(
                "error" if must_agree else "warning",
                "VRA-678",
                f"{name} is {_setting(value)} where Ray was started there, {_setting(usual)} on node "
                f"{example.address}: ranks {'that differ hang' if must_agree else 'behave differently'}.",
                f"Set {name} where the engine is started, which copies it to all nodes; or restart Ray there with "
                f"`{_command(name, usual)}`.",
                variable=name,
                here=value,
                there=usual,
            )


def check_whitelist(node: NodeView) -> Iterator[Finding]:
    """Yield a warning where HCCL is to accept listed addresses only, and there is no list."""
    environment = node.record.environment
    if environment.get("HCCL_WHITELIST_DISABLE") == "0" and not environment.get("HCCL_WHITELIST_FILE"):
        yield node.finding(
            "warning",
            "VRA-679",
            "HCCL_WHITELIST_DISABLE=0 lets HCCL accept listed addresses only, and HCCL_WHITELIST_FILE is not set.",
            "`export HCCL_WHITELIST_DISABLE=1`, or HCCL_WHITELIST_FILE=FILE, before `ray start` there.",
            variable="HCCL_WHITELIST_DISABLE",
        )
    if "HCCL_WHITELIST_FILE" in node.record.missing_files and environment.get("HCCL_WHITELIST_DISABLE") == "0":
        yield node.finding(
            "warning",
            "VRA-626",
            f"HCCL_WHITELIST_FILE={environment.get('HCCL_WHITELIST_FILE')} is not there, and HCCL_WHITELIST_DISABLE=0 "
            "lets HCCL accept the addresses in it only.",
            "Write that file there, or `export HCCL_WHITELIST_DISABLE=1` before `ray start`.",
            variable="HCCL_WHITELIST_DISABLE",
        )


def check_same_auth(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield an error for each node whose Ray has another mode of authentication. Not set, it is disabled."""
    found = {node: (node.record.environment.get(_AUTH_MODE) or _NO_AUTH).lower() for node in nodes}
    for node, mode, example, usual in odd_ones(found):
        yield node.finding(
            "error",
            "VRA-680",
            f"{_AUTH_MODE} is {mode!r} there, {usual!r} on node {example.address}.",
            f"`ray stop` there, `{_command(_AUTH_MODE, usual)}`, then `ray start`.",
            here=mode,
            there=usual,
        )


def check_same_mtu(nodes: Sequence[NodeView]) -> Iterator[Finding]:
    """Yield a warning for each node whose interface for Ray has another MTU: large messages then get lost."""
    for node in nodes:
        if node.record.mtu is None and node.ray:
            yield _no_interface(node)
    found = {node: node.record.mtu for node in nodes if node.record.mtu}
    for node, mtu, example, usual in odd_ones(found):
        yield node.finding(
            "warning",
            "VRA-681",
            f"the interface with its address has an MTU of {mtu}, that of node {example.address} {usual}.",
            f"`sudo ip link set dev INTERFACE mtu {usual}` there; `ip -brief address` names the interface.",
            here=mtu,
            there=usual,
        )


def _no_interface(node: NodeView) -> Finding:
    return node.unknown("no interface has its address for Ray", "`ip -brief address` there names them.")


def check_huge_pages(node: NodeView) -> Iterator[Finding]:
    """Yield a note where transparent huge pages are off: always and madvise are what distributions set."""
    if "[never]" in (node.record.files.get("transparent_hugepage") or ""):
        yield node.finding(
            "info",
            "VRA-688",
            "transparent huge pages are off (never): processes with much memory of the host, as for offloaded weights "
            "and KV caches, run slower.",
            "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled` there, where nothing else needs it.",
        )


def check_overcommit(node: NodeView) -> Iterator[Finding]:
    """Yield a note where the kernel gives out no more memory than there is."""
    if (node.record.files.get("overcommit_memory") or "").strip() == "2":
        yield node.finding(
            "info",
            "VRA-628",
            "vm.overcommit_memory is 2: processes that reserve more memory than they use, as CANN and PyTorch do, may "
            "get none.",
            "`sudo sysctl vm.overcommit_memory=0` there, which is Linux's default.",
        )


def _setting(value: str | None) -> str:
    return "not set" if value is None else repr(value)


def _command(name: str, value: str | None) -> str:
    return f"unset {name}" if value is None else f"export {name}={value}"


CHECKS = (
    Check("limits", "the raylet may open files and lock memory", "/proc/PID/limits", check_limits),
    Check("overcommit", "memory may be reserved", "/proc/sys/vm/overcommit_memory", check_overcommit),
    Check(
        "huge-pages",
        "transparent huge pages are not off",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        check_huge_pages,
    ),
    Check("shared-memory", "/dev/shm is large enough", "statvfs", check_shared_memory, at_start="warns"),
    Check(
        "own-name",
        "the node's name is no loopback address",
        "its name, resolved there",
        check_name,
        applies=on_several_nodes,
        at_start="warns",
    ),
    Check(
        "clock",
        "clocks agree within a second",
        "time before and after",
        check_clock,
        applies=on_every_node,
        at_start="warns",
        of_ray=True,
    ),
    Check(
        "reachable",
        "every node reaches Ray on every other",
        "TCP connections",
        check_reachable,
        applies=on_every_node,
        at_start="warns",
        of_ray=True,
    ),
    Check("hccl-ports", "HCCL's ports are free", "/proc/net/tcp", check_ports, of_ray=True),
    Check(
        "worker-ports",
        "ports of Ray's workers are not HCCL's",
        "the raylet's command line",
        check_worker_ports,
        at_start="warns",
    ),
    Check(
        "npu-ports",
        "HCCL has a range of ports on NPUs that engines share",
        "`ray start`, engines in Ray's control store",
        check_npu_ports,
        of_ray=True,
        also=(ENGINES,),
    ),
    Check(
        "host-interface",
        "the interface for HCCL, gloo and vLLM reaches the other nodes",
        "HCCL_IF_IP, HCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, VLLM_HOST_IP, routes",
        check_host_interface,
        of_cluster=True,
        applies=on_several_nodes,
        also=(ROUTES,),
    ),
    Check(
        "same-variables",
        "HCCL's variables are equal on all nodes",
        "environment of `ray start`",
        check_same_variables,
        of_cluster=True,
        at_start="warns",
    ),
    Check("whitelist", "HCCL's whitelist has a file", "HCCL_WHITELIST_*", check_whitelist, at_start="warns"),
    Check(
        "same-auth",
        "Ray's authentication is equal on all nodes",
        "RAY_AUTH_MODE",
        check_same_auth,
        of_cluster=True,
        applies=on_every_node,
    ),
    Check(
        "same-mtu",
        "interfaces of Ray have one MTU",
        "psutil.net_if_stats",
        check_same_mtu,
        of_cluster=True,
        applies=on_every_node,
    ),
)
