"""Recorded machines: what npu-smi and hccn_tool print on them, and their version files, one folder each in machines/.

``console.txt`` is a session: each line `$ COMMAND` is followed by what the command wrote, and by `$? CODE` where that
is not 0. ``*`` in a command is any number; ``{i}`` in its output is the number after -i, ``{c}`` that after -c,
``{host}`` the number of the node. A command that stands there several times answers in turn. A tool that no command
names is not on the machine. ``base`` names the machine of which this one is a variant.

All of it was written by us, from what the tools are known to print; none was copied from a machine.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from vllm_ray_ascend.cluster.node_facts import NodeFacts
from vllm_ray_ascend.devices.cards import parse_npu_smi
from vllm_ray_ascend.doctor.queries import LIST, QUERIES, command_lines, second_command_lines
from vllm_ray_ascend.doctor.records import Limit, ModelFiles, NodeRecord, Output, RayNode, Route, SharedMemory, User

MACHINES = Path(__file__).parent / "machines"
FILES = {
    "driver": "driver/version.info",
    "firmware": "firmware/version.info",
    "cann": "cann/ascend_toolkit_install.info",
}
TOOLS = ("npu-smi", "hccn_tool")
HOSTS = range(1, 65)
MODEL_FILES = ModelFiles(path="/models/qwen", config="c0ffee", index_bytes=900, weights_bytes=1000)


class Answer(NamedTuple):
    """One command of a session, with its output and exit code."""

    command: str
    text: str
    code: int


class Machine:
    """A machine; of several ``names``, those before hide what the later ones say. ``host`` is the node's number."""

    def __init__(self, *names: str, host: int = 1) -> None:
        self.host = host
        own = [MACHINES / name for name in names]
        self.folders = list(dict.fromkeys([*own, *(base for folder in own for base in _bases(folder))]))
        self.sessions = [read_session(folder) for folder in self.folders]
        self._calls: Counter[str] = Counter()

    def run(self, line: str) -> Output:
        """Return what a command writes on this machine."""
        tool, *_, last = line.split()
        if not any(answer.command.startswith(f"{tool} ") for session in self.sessions for answer in session):
            return Output(None, f"{tool} is not there")
        found = next(filter(None, ([a for a in s if fnmatchcase(line, a.command)] for s in self.sessions)), None)
        if found is None:
            return Output(255, f"Error parameter of {last}\n")
        exact = [answer for answer in found if "*" not in answer.command] or found
        answer = exact[min(self._calls[line], len(exact) - 1)]
        self._calls[line] += 1
        return Output(answer.code, self._fill(answer.text, line))

    def file(self, name: str) -> str | None:
        """Return a version file, by the name of FILES."""
        paths = (folder / FILES[name] for folder in self.folders)
        return next((path.read_text() for path in paths if path.exists()), None)

    def record(self) -> NodeRecord:
        """Return what is collected on this machine, on a host where all is well."""
        address = f"10.0.0.{self.host}"
        dies = tuple(parse_npu_smi(self.run(LIST).text))
        outputs = {line: self.run(line) for line in [LIST, *command_lines(dies, QUERIES)]}
        outputs |= {name: self.run(line) for line, name in second_command_lines(dies, QUERIES)}
        count = len(dies) or 8
        return NodeRecord(
            address=address,
            facts=NodeFacts(
                address,
                f"node-{self.host}",
                cann_devices=count,
                device_files=tuple(range(count)),
                npu_smi=len(dies) or None,
                dies=dies,
                acl_importable=True,
                versions={"vllm-ray-ascend": "0.1.0", "vllm-ascend": "0.30.0rc2"},
            ),
            outputs=outputs,
            files={name: self.file(name) for name in FILES},
            environment={"ASCEND_HOME_PATH": "/usr/local/Ascend/cann"},
            versions={
                "Python": "3.11.7",
                "ray": "2.60.0",
                "vllm": "0.30.0+empty",
                "vllm-ascend": "0.30.0rc2",
                "torch": "2.10.0",
                "torch-npu": "2.10.0.post4",
            },
            cann_home="/usr/local/Ascend/cann",
            nnal=["/usr/local/Ascend/nnal/atb/8.5.1/version.info"],
            limits={"Max open files": Limit(65536, 65536), "Max locked memory": Limit(None, None)},
            user=User(uid=0, groups=[0], name="root"),
            shared_memory=SharedMemory(64 << 30, 60 << 30),
            listening_ports=[22, 6379],
            own_addresses=[address],
            mtu=1500,
            interfaces=[
                ("lo", "127.0.0.1"),
                ("docker0", "172.17.0.1"),
                ("eth0", address),
                ("eth1", f"10.1.0.{self.host}"),
            ],
            routes={
                f"10.{network}.0.{host}": Route(f"10.{network}.0.{self.host}") for network in (0, 1) for host in HOSTS
            },
            model=MODEL_FILES,
            started=100.5,
            ended=103.0,
            ray=RayNode(npus=count, gpus=0, free_npus=count, sent=100.0, received=103.1, shared_physical_ids=[]),
        )

    def ping(self, record: NodeRecord, lines: list[str]) -> NodeRecord:
        """Return the record with what the machine's NPUs write when they ping."""
        return replace(record, outputs={**record.outputs, **{line: self.run(line) for line in lines}})

    def install(self, folder: Path) -> dict[str, str]:
        """Write version files and programs that replay the session below ``folder``; return the variables to set."""
        for name, path in FILES.items():
            if (text := self.file(name)) is not None:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
        (folder / "bin").mkdir(parents=True)
        answers = [[a._asdict() for a in session] for session in self.sessions]
        (folder / "answers.json").write_text(json.dumps({"host": self.host, "sessions": answers}))
        for tool in TOOLS:
            if self.run(f"{tool} -h").code is not None:
                program = folder / "bin" / tool
                script = (Path(__file__).with_name("replay.py")).read_text()
                program.write_text(f"#!{sys.executable} -IS\n{script}")
                program.chmod(0o755)
        return {"ASCEND_DRIVER_PATH": str(folder / "driver"), "ASCEND_HOME_PATH": str(folder / "cann")}

    def _fill(self, text: str, line: str) -> str:
        numbers = dict(re.findall(r"-([ic]) (\d+)", line))
        return re.sub(r"\{(i|c|host)\}", lambda found: {**numbers, "host": str(self.host)}[found[1]], text)


def read_session(folder: Path) -> list[Answer]:
    """Return the commands of a machine's console.txt, those with numbers before those for any."""
    path = folder / "console.txt"
    answers = list(_answers(path.read_text().split("\n$ ")) if path.exists() else ())
    return sorted(answers, key=lambda answer: "*" in answer.command)


def _answers(parts: list[str]) -> Iterator[Answer]:
    for part in parts:
        command, _, text = part.removeprefix("$ ").partition("\n")
        text, _, code = text.partition("$? ")
        yield Answer(command.strip(), text, int(code or 0))


def _bases(folder: Path) -> list[Path]:
    """Return the machines of which one is a variant, the nearest first."""
    base = folder / "base"
    if not base.exists():
        return []
    found = MACHINES / base.read_text().strip()
    return [found, *_bases(found)]
