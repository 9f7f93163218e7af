"""Accept a machine or a cluster with NPUs: `python -m tests.hardware MODEL [--tp N] [--out FOLDER]`.

Runs on one Atlas node, or on a node of a running Ray cluster. Each step is a process of its own with a limit, so that
one that hangs does not end the rest. Writes report.md and report.json, without secrets, to be sent back.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from tests.hardware.engine import MARKER
from vllm_ray_ascend import __version__
from vllm_ray_ascend.compat.versions import installed, stack
from vllm_ray_ascend.environment.redact import redact_value

ROOT = Path(__file__).resolve().parents[2]
ENGINE_LIMIT_S = 1800.0
_COUNT = f"""
import json, ray, torch, torch_npu
from types import SimpleNamespace
from vllm_ray_ascend.cluster.connect import connect
here = torch.npu.device_count()
connect(SimpleNamespace(ray_runtime_env=None))  # as engines do: they join a cluster, or start one
nodes = [node["Resources"].get("NPU", 0) for node in ray.nodes() if node["Alive"]]
found = dict(npus_here=here, nodes=sum(1 for npus in nodes if npus), npus=sum(nodes), chip=torch.npu.get_device_name(0))
print({MARKER!r} + json.dumps(found))
"""
_READY = re.compile(r"vllm-ray-ascend \S+ ready: [^;]*; (\d+ nodes?, \d+ NPUs?; .*)")
_NODE = re.compile(r"-> (\S+)")
_TESTS = re.compile(r"(\d+ (?:passed|failed|skipped|error)[^=]*?) in \d")


# Without tests/conftest.py, which needs packages that an Atlas server lacks.
_DEVICE_TESTS = ("-m", "pytest", "--confcutdir", "tests/hardware", "tests/hardware", "-m", "npu")


@dataclass(frozen=True)
class Step:
    """One step. ``lacks`` says why it cannot run here."""

    name: str
    what: str
    command: tuple[str, ...]
    limit_s: float = ENGINE_LIMIT_S
    lacks: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a step; ``state`` is passed, failed or skipped."""

    name: str
    what: str
    state: str
    why: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


def plan(model: str, tp_size: int, npus_here: int, npus: float) -> list[Step]:
    """Return the steps, in their order, for a node with so many NPUs in a cluster with so many."""

    def lacking(needed: int, has: float, where: str) -> str:
        return "" if has >= needed else f"needs {needed} NPUs {where}, there are {has:g}"

    def engine(name: str, what: str, lacks: str, **options: Any) -> Step:
        options = {"tensor_parallel_size": tp_size, "distributed_executor_backend": "ray", **options}
        given = json.dumps({"model": model, "options": options})
        return Step(name, what, ("-m", "tests.hardware.engine", given), lacks=lacks)

    def question(name: str, what: str, lacks: str) -> Step:
        return Step(name, what, ("-m", "tests.hardware.questions", name), lacks=lacks)

    two, here = lacking(2, npus_here, "on this node"), lacking(tp_size, npus_here, "on this node")
    everywhere = lacking(2 * tp_size, npus, "in the Ray cluster")
    return [
        Step("device", "devices, streams, graphs, HCCL on this node", _DEVICE_TESTS),
        question("abort", "our end of a communicator while an operation waits", two),
        question("destroy", "HcclCommDestroy while an operation waits", two),
        question("stop", "stop_device while operators are queued", ""),
        engine("mp", f"TP {tp_size}, vLLM's multiprocessing", here, distributed_executor_backend="mp"),
        engine("ray", f"TP {tp_size} over Ray", here),
        engine("eager", f"TP {tp_size} over Ray, without graphs", here, enforce_eager=True),
        engine("pipeline", f"TP {tp_size} x PP 2 over Ray", everywhere, pipeline_parallel_size=2),
        engine("data", f"TP {tp_size} x DP 2 over Ray", everywhere, data_parallel_size=2, data_parallel_backend="ray"),
    ]


def run(step: Step, log: Path) -> Outcome:
    """Run one step, with its output in ``log``."""
    if step.lacks:
        return Outcome(step.name, step.what, "skipped", step.lacks)
    began = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                [sys.executable, *step.command],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=step.limit_s,
                check=False,
            )
            why = f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            why = f"not done within {step.limit_s:g} s"
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith(MARKER)]
    figures = {**(json.loads(found[-1].removeprefix(MARKER)) if found else {}), **placements(lines), **counts(lines)}
    if why:
        why = f"{why}; {next((line.strip() for line in reversed(lines) if line.strip()), 'no output')}"
    state = "failed" if why else "passed"
    return Outcome(step.name, step.what, state, why, round(time.monotonic() - began, 1), figures)


def counts(lines: Sequence[str]) -> dict[str, str]:
    """Return how many tests of pytest have passed, failed and were skipped, by the last line of its output."""
    found = [match[1] for line in lines if (match := _TESTS.search(line))]
    return {"tests": found[-1]} if found else {}


def placements(lines: Sequence[str]) -> dict[str, Any]:
    """Return on which NPUs the engines of a log have their ranks; nodes are called A, B, ..."""
    found = [match[1] for line in lines if (match := _READY.search(line))]
    names: dict[str, str] = {}
    for match in _NODE.finditer(" ".join(found)):
        names.setdefault(match[1], f"node {chr(ord('A') + len(names) % 26)}")
    placed = [_NODE.sub(lambda match: f"-> {names[match[1]]}", text) for text in found]
    return {"placement": list(dict.fromkeys(placed))} if placed else {}


def compare(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes with those failed whose texts differ from the ones of ``mp``, and with ratios to it.

    Without graphs, other kernels may round in another way: a difference is noted there and no failure.
    """
    mp = next((each for each in outcomes if each.name == "mp" and each.state == "passed"), None)
    return [each if mp is None or each is mp else _compared(each, mp) for each in outcomes]


def _compared(outcome: Outcome, mp: Outcome) -> Outcome:
    if "texts" not in outcome.figures or outcome.state != "passed":
        return outcome
    same = outcome.figures["texts"] == mp.figures["texts"]
    ratio = median(outcome.figures["tokens_per_s"]) / median(mp.figures["tokens_per_s"])
    figures = {**outcome.figures, "texts_as_mp": same, "tokens_per_s_over_mp": round(ratio, 3)}
    failed = not same and outcome.name != "eager"
    if failed:
        outcome = replace(outcome, state="failed", why="other texts than with mp")
    return replace(outcome, figures=figures)


def describe(facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Return the report for people."""
    lines = ["# Acceptance of vllm-ray-ascend", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "variables"]
    lines += ["", "| step | what | result | seconds | figures |", "|---|---|---|---|---|"]
    for each in outcomes:
        figures = ", ".join(f"{name} {_short(value)}" for name, value in each.figures.items() if name != "texts")
        result = f"{each.state}: {each.why}" if each.why else each.state
        lines.append(f"| {each.name} | {each.what} | {result} | {each.seconds:g} | {figures} |")
    lines += ["", "Variables:", "", *(f"    {name}={value}" for name, value in facts["variables"].items()), ""]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").splitlines()[0][:200]


def redacted(value: Any) -> Any:
    """Return what a report has with addresses, this machine's name and the user's folder hidden, in all its strings."""
    if isinstance(value, Mapping):
        return {name: redacted(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each) for each in value]
    if not isinstance(value, str):
        return value
    for known, instead in ((socket.gethostname(), "HOST"), (str(Path.home()), "~")):
        value = re.sub(rf"(?<![\w/.-]){re.escape(known)}(?![\w.-])", instead, value)
    return _ADDRESS.sub(lambda match: "ADDRESS" if _is_address(match[0]) else match[0], value)


_ADDRESS = re.compile(r"(?<![\w.:])(?:\d+(?:\.\d+){3}|[0-9a-fA-F]*(?::[0-9a-fA-F]*){2,})(?![\w.])")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _variables() -> dict[str, str]:
    names = ("ASCEND", "HCCL", "RAY_", "VLLM", "GLOO", "PYTORCH_NPU", "TORCH", "SOFTNPU")
    return {name: redact_value(name, value) for name, value in sorted(os.environ.items()) if name.startswith(names)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; 0 where none failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.hardware", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="path or name of a model, the same on every node")
    parser.add_argument("--tp", type=int, default=2, help="tensor parallel size of the engines (default 2)")
    parser.add_argument("--out", type=Path, default=Path("acceptance"), help="folder of the report and the logs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = run(Step("machine", "NPUs", ("-c", _COUNT), 300.0), options.out / "machine.log")
    if machine.state != "passed":
        print(f"no NPU can be counted here: {machine.why}. See {options.out}/machine.log", file=sys.stderr)
        return 2
    counted = machine.figures
    found = {**counted, "model": Path(options.model).name, "variables": redacted(_variables())}
    facts = {**_software(), **found}
    outcomes: list[Outcome] = []
    for step in plan(options.model, options.tp, counted["npus_here"], counted["npus"]):
        print(f"{step.name}: {step.what} ...", flush=True)
        outcomes.append(run(step, options.out / f"{step.name}.log"))
        print(f"  {outcomes[-1].state} {outcomes[-1].why}", flush=True)
        compared = compare(outcomes)
        _write(options.out, facts, compared)  # what there is when a later step is ended by hand is kept
    failed = [f"{each.name} ({options.out}/{each.name}.log)" for each in compared if each.state == "failed"]
    print(f"{options.out}/report.md: {len(failed)} of {len(compared)} steps failed", *failed, sep="\n  ")
    return 1 if failed else 0


def _software() -> dict[str, str]:
    """Return when and with what the report is made."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "NPUs": "software NPUs" if "SOFTNPU_LIB" in os.environ else "as the driver has them",
        "vllm-ray-ascend": __version__,
        "commit": commit.stdout.strip() or "unknown",
        **stack(),
        "torch": installed("torch") or "not installed",
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "doctor": _doctor(),
    }


def _doctor() -> str:
    """Return what doctor says of this node: chip, driver, CANN, and its findings without addresses."""
    command = [sys.executable, "-m", "vllm_ray_ascend.cli.main", "doctor", "--local", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return f"exit code {done.returncode}"
    (node,) = report["nodes"]
    codes = sorted({f"{each['severity']} {each['code']}" for each in report["findings"]})
    return f"{node['chip']}, driver {node['driver'] or 'unknown'}, CANN {node['cann'] or 'unknown'}; {', '.join(codes)}"


def _write(folder: Path, facts: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    hidden = [replace(each, why=redacted(each.why), figures=redacted(each.figures)) for each in outcomes]
    (folder / "report.md").write_text(describe(facts, hidden))
    report = {"facts": facts, "steps": [asdict(each) for each in hidden]}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
