"""Collect what the checks need of the node of this process. Runs in a Ray task there, or with `--local`.

Nothing is changed and nothing is raised: what cannot be read is missing in the record.
"""

from __future__ import annotations

import errno
import os
import pwd
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from platform import python_version
from threading import Thread
from typing import Any, TypeVar

import msgspec

from vllm_ray_ascend.addresses import split_host_port
from vllm_ray_ascend.cluster.node_facts import (
    LATE,
    LIMIT_S,
    STUCK,
    NodeFacts,
    ProgramOutput,
    collect_facts_and_list,
    raylet_environment,
    start_program,
    wait_for_output,
)
from vllm_ray_ascend.compat.versions import installed
from vllm_ray_ascend.devices.cards import Die
from vllm_ray_ascend.doctor import parsers
from vllm_ray_ascend.doctor.model_files import model_files
from vllm_ray_ascend.doctor.queries import (
    HCCN_TOOL,
    LIST,
    NPU_SMI,
    PROCESSES,
    ROUTES,
    SERVE_LLM,
    command_lines,
    model_path,
    second_command_lines,
)
from vllm_ray_ascend.doctor.records import (
    DeviceFile,
    Holder,
    Limit,
    NodeRecord,
    Output,
    SharedMemory,
    User,
)
from vllm_ray_ascend.doctor.serve_llm import names_missing_here
from vllm_ray_ascend.environment.derive import interface_with_address
from vllm_ray_ascend.environment.node import list_interfaces, read_first_port
from vllm_ray_ascend.environment.redact import redact_value
from vllm_ray_ascend.environment.table import scope_of
from vllm_ray_ascend.settings import variable_of

T = TypeVar("T")

Run = Callable[[str], Output]
"""Runs a command line and returns its output."""

PACKAGES = ("vllm", "vllm-ascend", "vllm-ray-ascend", "ray", "torch", "torch-npu")
_RAYLET = "RAY_RAYLET_PID"
"""Set by each raylet for what it starts."""
_ALSO = ("RAY_AUTH_MODE", "RAY_ADDRESS")
_AT_ONCE = 8
_CONNECT_S = 3.0
_LITTLE_S = 1.0
"""For /proc, after the deadline as well: only what waits inside the driver is not read at once."""
_NAMED_FILES = ("HCCL_WHITELIST_FILE",)
_PINNED = re.compile(r"(torch|torch[-_]npu) ?\(?== ?([\w.+]+)")
_CUDA_ONLY = ("nvidia-", "flashinfer", "xformers")
_DRIVER, _ASCEND = "usr/local/Ascend/driver", "usr/local/Ascend"
_TOOLKIT_INFO = ("ascend_toolkit_install.info", "*-linux/ascend_toolkit_install.info", "version.cfg")


def collect_as_dict(address: str, commands: Sequence[str], peers: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Return this node's record as plain data, for which `decode_record` is the inverse."""
    record: dict[str, Any] = msgspec.to_builtins(collect_record(address, commands, peers, limit_s), str_keys=True)
    return record


def decode_record(values: Mapping[str, Any]) -> NodeRecord:
    """Return the record of a dictionary that another version of this package may have made."""
    return msgspec.convert(values, NodeRecord, strict=False)


def collect_record(
    address: str,
    commands: Sequence[str],
    peers: Sequence[str] = (),
    limit_s: float = 20.0,
    root: Path = Path("/"),
) -> NodeRecord:
    """Return what the checks need of this node, whose address for Ray is ``address``, within ``limit_s`` seconds.

    ``commands`` are those of queries, SERVE_LLM, ROUTES and that of a model; ``peers`` HOST:PORT of the other nodes'
    raylets. Files are read below ``root``.
    """
    started, deadline = time.time(), time.monotonic() + limit_s
    environment = raylet_environment()
    unreachable, own_addresses = _start(_unreachable, peers), _start(_own_addresses, environment)
    devices = _start(_device_files, root, _open_error)
    model = _start(model_files, model_path(commands))
    facts, listed = collect_facts_and_list(address, min(limit_s, max(LIMIT_S, limit_s / 2)))
    listening_ports, first_port = _listening_ports(), read_first_port()
    driver = _driver_folder(environment, root)
    listing = {LIST: _as_output(NPU_SMI, listed) if listed else Output(None, f"{NPU_SMI} is not there")}
    outputs = listing | _run_commands(partial(run_command, driver=driver, deadline=deadline), facts.dies, commands)
    cann = _cann_home(environment, root)
    holders = _start(_holders, outputs, facts)
    return NodeRecord(
        address=address,
        facts=facts,
        root=os.geteuid() == 0,
        outputs=outputs,
        files=_read_files(driver, cann, root),
        devices=_result(devices, deadline, {}) or _device_files(root, lambda path: LATE),
        environment=_known_variables(environment),
        versions={**{package: installed(package) for package in PACKAGES}, "Python": python_version()},
        cuda_packages=_cuda_requirements(),
        pins=_pins(),
        missing_files=[name for name in _NAMED_FILES if (path := environment.get(name)) and not Path(path).is_file()],
        serve_llm_lacks=names_missing_here() if SERVE_LLM in commands else [],
        cann_home=str(cann or ""),
        nnal=[str(path) for path in sorted((root / _ASCEND).glob("nnal/atb/*/version.info"))],
        limits=_raylet_limits(),
        user=_user(),
        shared_memory=_shared_memory(),
        holders=_result(holders, max(deadline, time.monotonic() + _LITTLE_S), {}),
        listening_ports=listening_ports,
        port_holders=_port_holders({port for port in listening_ports or () if port >= first_port}),
        first_port=first_port,
        worker_ports=_worker_ports(),
        own_addresses=_result(own_addresses, deadline, []),
        mtu=_mtu(address),
        unreachable=_result(unreachable, deadline, {}),
        interfaces=list_interfaces() if ROUTES in commands else [],
        model=_result(model, deadline, None),
        started=started,
        ended=time.time(),
    )


def ping_as_dict(lines: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Return what these command lines wrote on this node, as plain data, for which `decode_outputs` is the inverse."""
    deadline = time.monotonic() + limit_s
    driver = _driver_folder(raylet_environment(), Path("/"))
    outputs: dict[str, Any] = msgspec.to_builtins(
        _run_all(partial(run_command, driver=driver, deadline=deadline), lines)
    )
    return outputs


def decode_outputs(values: Mapping[str, Any]) -> dict[str, Output]:
    """Return the outputs by command line of a dictionary that another version of this package may have made."""
    return msgspec.convert(values, dict[str, Output])


def run_command(line: str, driver: Path, deadline: float) -> Output:
    """Run a command line and return its output. hccn_tool is looked for in the driver too, where it is not on PATH."""
    name, *arguments = line.split()
    program = shutil.which(name) or (shutil.which(driver / "tools" / name) if name == HCCN_TOOL else None)
    if program is None:
        return Output(None, f"{name} is not there")
    if time.monotonic() >= deadline:
        return Output(None, f"{name} was not run, since no time was left")
    try:
        process = start_program([program, *arguments], stderr=subprocess.STDOUT)
    except OSError as error:
        return Output(None, f"{name} could not be run ({error.strerror})")
    return _as_output(name, wait_for_output(process, deadline))


def _as_output(name: str, written: ProgramOutput) -> Output:
    if written.code is not None:
        return Output(written.code, written.stdout)
    return Output(None, f"{name} {STUCK if STUCK in written.stderr else f'gave {LATE}'}")


def _run_commands(run: Run, dies: Sequence[Die], commands: Sequence[str]) -> dict[str, Output]:
    outputs = _run_all(run, command_lines(dies, commands))
    again = second_command_lines(dies, commands)
    later = _run_all(run, [line for line, _ in again])
    return outputs | {name: later[line] for line, name in again}


def _run_all(run: Run, lines: Sequence[str]) -> dict[str, Output]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(lines, pool.map(run, lines), strict=True))


def _driver_folder(environment: Mapping[str, str], root: Path) -> Path:
    """Return the driver's folder: that of the environment, or of the installation's own record, or the usual one."""
    if given := environment.get("ASCEND_DRIVER_PATH"):
        return Path(given)
    recorded = parsers.parse_properties(_read(root / "etc/ascend_install.info") or "")
    return root / recorded.get("Driver_Install_Path_Param", _ASCEND).lstrip("/") / "driver"


def _cann_home(environment: Mapping[str, str], root: Path) -> Path | None:
    """Return where CANN is; since 8.5 in cann-VERSION, with the link `cann`."""
    usual = [root / _ASCEND / name for name in ("ascend-toolkit/latest", "cann")]
    given = [Path(environment["ASCEND_HOME_PATH"])] if environment.get("ASCEND_HOME_PATH") else []
    versioned = sorted((root / _ASCEND).glob("cann-*"), reverse=True)
    return next((path for path in [*given, *usual, *versioned] if path.is_dir()), None)


def _read_files(driver: Path, cann: Path | None, root: Path) -> dict[str, str | None]:
    """Return the version files by a name of ours, so that nodes can be compared whatever their paths."""
    toolkit = (path for pattern in _TOOLKIT_INFO for path in sorted(cann.glob(pattern))) if cann else iter(())
    paths = {
        "driver": driver / "version.info",
        "firmware": driver.parent / "firmware" / "version.info",
        "cann": next(toolkit, None),
        "hccn.conf": root / "etc/hccn.conf",
        "transparent_hugepage": Path("/sys/kernel/mm/transparent_hugepage/enabled"),
        "overcommit_memory": Path("/proc/sys/vm/overcommit_memory"),
    }
    return {name: _read(path) if path else None for name, path in paths.items()}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


_DEVICE_FILES = ("davinci[0-9]*", "davinci_manager", "devmm_svm", "hisi_hdc")


def _device_files(root: Path, open_error: Callable[[Path], str]) -> dict[str, DeviceFile]:
    folder = root / "dev"
    paths = (path for pattern in _DEVICE_FILES for path in sorted(folder.glob(pattern)))
    return {path.name: found for path in paths if (found := _device_file(path, open_error))}


def _device_file(path: Path, open_error: Callable[[Path], str]) -> DeviceFile | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return DeviceFile(mode=status.st_mode & 0o777, uid=status.st_uid, gid=status.st_gid, error=open_error(path))


def _open_error(path: Path) -> str:
    """Return why the file cannot be opened: EPERM is the container's list of devices, EACCES its owner."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return ""


def _known_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the table knows, secrets hidden."""
    return {
        name: redact_value(name, value)
        for name, value in sorted(environment.items())
        if scope_of(name) in ("node", "copied") or name in _ALSO
    }


def _cuda_requirements() -> list[str]:
    try:
        required = requires("vllm") or []
    except PackageNotFoundError:
        return []
    return sorted(
        {name for each in required if (name := each.split()[0]).startswith(_CUDA_ONLY) and "extra" not in each}
    )


def _pins() -> dict[str, str]:
    """Return the versions of torch and torch-npu with which vllm-ascend was built, as its metadata names them."""
    try:
        required = requires("vllm-ascend") or []
    except PackageNotFoundError:
        return {}
    return {found[1].replace("_", "-"): found[2] for each in required if (found := _PINNED.match(each))}


def _raylet_limits() -> dict[str, Limit]:
    text = _read(Path("/proc") / os.environ.get(_RAYLET, "self") / "limits") or ""
    return {name: Limit(*limits) for name, limits in parsers.parse_limits(text).items()}


def _user() -> User:
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = ""
    return User(uid=os.geteuid(), groups=sorted({os.getegid(), *os.getgroups()}), name=name)


def _shared_memory() -> SharedMemory | None:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return SharedMemory(found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail)


def _holders(outputs: Mapping[str, Output], facts: NodeFacts) -> dict[int, Holder]:
    lines = (PROCESSES.line(die) for die in facts.dies)
    texts = (outputs[line].text for line in lines if line in outputs)
    pids = {process.pid for text in texts for process in parsers.parse_processes(text) or ()}
    return {pid: found for pid in sorted(pids) if (found := _holder(pid))}


def _holder(pid: int) -> Holder | None:
    import psutil  # type: ignore[import-untyped]

    try:
        process = psutil.Process(pid)
        above = {str(parent.pid) for parent in process.parents()}
        raylet, own = _raylet_of(process), os.environ.get(_RAYLET, "")
        of_ray = own in above or (raylet != "" and (raylet == own or _is_raylet(raylet)))
        name = _process_name(pid)
        command = redact_value("", " ".join(process.cmdline())) or name
    except (psutil.Error, OSError):
        return None
    return Holder(name=name, command=command, of_ray=of_ray, leftover=raylet != "" and not of_ray)


def _raylet_of(process: Any) -> str:
    """Return the id of the raylet that started a process, or one above it; empty where it does not say."""
    import psutil

    try:
        return str(process.environ().get(_RAYLET, ""))
    except psutil.AccessDenied:  # another user's: not started by this Ray
        return ""


def _is_raylet(pid: str) -> bool:
    """Return whether a raylet lives that has this id, which another process may have by now."""
    return pid.isdigit() and _process_name(int(pid)) == "raylet"


def _listening_ports() -> list[int] | None:
    texts = [_read(Path("/proc/net") / name) for name in ("tcp", "tcp6")]
    if not any(texts):
        return None
    return sorted({port for text in texts for port in parsers.parse_listening(text or "")})


def _port_holders(ports: Collection[int]) -> dict[int, str]:
    """Return who listens on these ports, as "NAME (pid N)". Looks at all processes: only where there is a port."""
    import psutil

    if not ports:
        return {}
    try:
        found = psutil.net_connections("tcp")
        pids = {each.laddr.port: each.pid for each in found if each.status == psutil.CONN_LISTEN and each.pid}
    except (psutil.Error, OSError):
        return {}
    return {port: f"{_process_name(pids[port])} (pid {pids[port]})" for port in ports if port in pids}


def _process_name(pid: int) -> str:
    return (_read(Path(f"/proc/{pid}/comm")) or "").strip() or "a process"


def _worker_ports() -> tuple[int, int] | None:
    command = _read(Path("/proc") / os.environ.get(_RAYLET, "self") / "cmdline") or ""
    return parsers.parse_worker_ports(command.replace("\0", " "))


def _start(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call what may wait for the network, a driver or a file system in a thread that nobody waits for at exit."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001  raised by `result`
            result.set_exception(error)

    Thread(target=call, daemon=True, name="RayAscendDoctor").start()
    return result


def _result(found: Future[T], deadline: float, otherwise: T) -> T:
    """Return a result, or ``otherwise`` at the deadline: a resolver without servers waits longer than anybody does."""
    done, _ = wait([found], max(0.0, deadline - time.monotonic()))
    return found.result() if done else otherwise


def _own_addresses(environment: Mapping[str, str]) -> list[str]:
    """Return to what the node's name resolves, where that matters: gloo uses it if no interface is derived."""
    if environment.get(variable_of("node_env")) != "off":
        return []
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _mtu(address: str) -> int | None:
    import psutil

    interface = interface_with_address(address, list_interfaces())
    found = psutil.net_if_stats().get(interface)
    return None if found is None else int(found.mtu)


def _unreachable(peers: Collection[str]) -> dict[str, str]:
    with ThreadPoolExecutor(max(1, min(len(peers), 32))) as pool:
        errors = dict(zip(peers, pool.map(_connect_error, peers), strict=True))
    return {peer: error for peer, error in errors.items() if error}


def _connect_error(peer: str) -> str:
    host, port = split_host_port(peer)
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
