"""What a CI runner has: NPUs, GPUs or neither, with their drivers. `python -m ci.runner` prints it.

The readers of the tools' output are pure; `detect` asks the machine.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

_LIMIT_S = 30.0
_BUS = re.compile(r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]")
_NPU_SMI = ("npu-smi", "info")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,name,driver_version,memory.total", "--format=csv,noheader,nounits")
_DRIVER = Path("/usr/local/Ascend/driver/version.info")
_CANN_HOMES = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann", "/usr/local/Ascend/latest")
_CANN_FILES = ("ascend_toolkit_install.info", "*/ascend_toolkit_install.info")

Kind = Literal["npu", "cuda", "none"]


@dataclasses.dataclass(frozen=True)
class Device:
    """One NPU (a die of an A3 card counts as one) or GPU, as its tool names it."""

    name: str
    healthy: bool = True


@dataclasses.dataclass(frozen=True)
class Runner:
    """A machine that runs suites. ``notes`` list what is missing or not healthy."""

    kind: Kind
    devices: tuple[Device, ...] = ()
    generation: str = ""
    """A2, A3, 310P, or empty: which jobs of the pipeline it is for."""
    driver: str = ""
    cann: str = ""
    machine: str = ""
    cores: int = 0
    root: bool = False
    compiler: str = ""
    notes: tuple[str, ...] = ()

    @property
    def has(self) -> frozenset[str]:
        """What suites can need of a machine, as far as it is there."""
        usable = any(device.healthy for device in self.devices)
        found = {"npu": self.kind == "npu" and usable, "cuda": self.kind == "cuda" and usable}
        found |= {"root": self.root, "compiler": bool(self.compiler)}
        return frozenset(name for name, there in found.items() if there)

    def describe(self) -> str:
        """Return one line for people."""
        counts: dict[str, int] = {}
        for device in self.devices:
            counts[device.name] = counts.get(device.name, 0) + 1
        parts = [", ".join(f"{count} x {name}" for name, count in counts.items()) or "no NPU, no GPU"]
        parts += [f"Atlas {self.generation}"] * (self.generation in ("A2", "A3"))
        parts += [f"driver {self.driver}"] * bool(self.driver) + [f"CANN {self.cann}"] * bool(self.cann)
        parts += [f"{self.cores} cores, {self.machine}", "root" if self.root else "not root"]
        parts += [self.compiler or "no C++ compiler"]
        return "; ".join(parts)


def read_npu_smi(text: str) -> tuple[str, list[Device]]:
    """Return version and NPUs in the output of `npu-smi info`.

    Each NPU has two rows: "| 0     910B3 | OK | ..." with its card, name and health, then "| 0 | 0000:C1:00.0 | ..."
    with the chip; an A3 card's two dies come as two such pairs. Rows of processes have no bus id.
    """
    version = re.search(r"npu-smi\s+(\S+)\s+Version:", text)
    devices: list[Device] = []
    card: tuple[str, str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) < 3:
            continue
        first = cells[0].split()
        if _BUS.fullmatch(cells[1]):
            if card is not None:
                devices.append(Device(card[0], card[1] == "OK"))
        elif len(first) == 2 and first[0].isdecimal() and not first[1].isdecimal():
            card = (first[1], cells[1])
    return version.group(1) if version else "", devices


def read_nvidia_smi(text: str) -> tuple[str, list[Device]]:
    """Return driver and GPUs in the output of `nvidia-smi --query-gpu=index,name,... --format=csv,noheader`."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    found = [row for row in rows if len(row) >= 3 and row[0].isdecimal()]
    return found[0][2] if found else "", [Device(row[1]) for row in found]


def read_version(text: str) -> str:
    """Return the version in a file of CANN's or of its driver's: a line `version=8.3.RC2`, in small letters or not."""
    found = re.search(r"^version=(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return found.group(1) if found else ""


def generation_of(names: Iterable[str], text: str = "") -> str:
    """Return the Atlas series of NPUs with these ``names``; ``text`` is the output of `npu-smi info`.

    An A3 card calls its dies Ascend910, as the first 910 did; only its table has the column Phy-ID.
    """
    kinds = {name.removeprefix("Ascend") for name in names}
    if kinds and all(re.match(r"910(C|_93)", kind) or (kind == "910" and "Phy-ID" in text) for kind in kinds):
        return "A3"
    if kinds and all(kind.startswith("910B") for kind in kinds):
        return "A2"
    return "310P" if kinds and all(kind.startswith("310P") for kind in kinds) else ""


def runner_of(npu: str | None, nvidia: str | None) -> Runner:
    """Return the runner, from the output of `npu-smi` and `nvidia-smi`, None where a tool is missing or failed."""
    version, npus = read_npu_smi(npu or "")
    driver, gpus = read_nvidia_smi(nvidia or "")
    notes = [f"npu-smi {version} lists no NPU"] * (npu is not None and not npus)
    notes += ["nvidia-smi lists no GPU"] * (nvidia is not None and not gpus)
    notes += [f"NPU {index} ({each.name}) is not healthy" for index, each in enumerate(npus) if not each.healthy]
    if npus:
        notes += ["GPUs are there as well, and are not used"] * bool(gpus)
        return Runner(
            "npu", tuple(npus), generation_of((each.name for each in npus), npu or ""), version, notes=tuple(notes)
        )
    if gpus:
        return Runner("cuda", tuple(gpus), driver=driver, notes=tuple(notes))
    return Runner("none", notes=tuple(notes))


def detect(environ: Mapping[str, str] = os.environ) -> Runner:
    """Return the machine of this process."""
    outputs = {command[0]: _ask(command) for command in (_NPU_SMI, _NVIDIA_SMI)}
    failed = [f"{name}: {answer[1]}" for name, answer in outputs.items() if answer is not None and answer[0] is None]
    texts = {name: answer[0] if answer else None for name, answer in outputs.items()}
    found = runner_of(texts["npu-smi"], texts["nvidia-smi"])
    driver = read_version(_read(_DRIVER)) if found.kind == "npu" else ""
    return dataclasses.replace(
        found,
        driver=driver or found.driver,
        cann=_cann(environ) if found.kind == "npu" else "",
        machine=platform.machine(),
        cores=os.cpu_count() or 0,
        root=os.geteuid() == 0,
        compiler=environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "",
        notes=(*found.notes, *failed),
    )


def _ask(command: tuple[str, ...]) -> tuple[str | None, str] | None:
    """Return the output of a tool, or None and the reason of its failure; None alone where there is no such tool."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode:
        return None, f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}"
    return done.stdout, ""


def _cann(environ: Mapping[str, str]) -> str:
    homes = [environ[name] for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if environ.get(name)]
    for home in (*homes, *_CANN_HOMES):
        for pattern in _CANN_FILES:
            for path in sorted(Path(home).glob(pattern)):
                if version := read_version(_read(path)):
                    return version
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def main(arguments: list[str]) -> int:
    """Print the runner of this machine, with ``--json`` for programs; 0."""
    found = detect()
    if "--json" in arguments:
        print(json.dumps({**dataclasses.asdict(found), "has": sorted(found.has)}, indent=2))
    else:
        print(found.describe(), *(f"note: {note}" for note in found.notes), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
