"""What Ray Serve LLM imports of vLLM and vLLM lacks: found in their files, reported as a note."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.doctor.machine import Machine
from vllm_ray_ascend.doctor.judge import choose_checks, make_report
from vllm_ray_ascend.doctor.records import Snapshot
from vllm_ray_ascend.doctor.serve_llm import IMPORTERS, names_missing, names_missing_here

pytestmark = pytest.mark.unit

IMPORTS = """
from typing import TYPE_CHECKING
try:
    from vllm.engine.arguments import Arguments
    from vllm.engine import protocol
    from vllm.entrypoints import moved as here
except ImportError as error:
    from vllm.fallback import anything
    raise ImportError("vLLM is installed but failed to import") from error
if TYPE_CHECKING:
    from vllm.types import Only
def later():
    from vllm.late import Name
"""


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_only_what_an_import_executes_is_missing(tmp_path: Path) -> None:
    ray, vllm = tmp_path / "ray", tmp_path / "vllm"
    write(ray / IMPORTERS[0], IMPORTS)
    write(vllm / "engine" / "__init__.py", "from . import protocol\n")
    write(vllm / "engine" / "arguments.py", "class Arguments: ...\n")
    write(vllm / "entrypoints" / "__init__.py")
    assert names_missing(ray, vllm) == ["vllm.entrypoints.moved"]
    write(vllm / "entrypoints" / "__init__.py", "moved = 1\n")
    assert names_missing(ray, vllm) == []


def test_a_ray_without_serve_llm_lacks_nothing(tmp_path: Path) -> None:
    assert names_missing(tmp_path / "ray", tmp_path / "vllm") == []


def test_the_pair_of_this_environment_fits() -> None:
    assert names_missing_here() == []


def test_it_is_a_note_and_no_warning() -> None:
    record = replace(Machine("a2").record(), serve_llm_lacks=["vllm.a.b"])
    snapshot = Snapshot(version="0.1.0", time=0.0, level="quick", head_address="10.0.0.1:6379", nodes=[record])
    report = make_report(snapshot, choose_checks("quick"))
    (finding,) = report.findings
    assert (finding.severity, finding.code, report.status) == ("info", "VRA-621", "ok")
    assert finding.text.endswith("than 0.30.0+empty, which has no vllm.a.b.") and "Ray 2.60.0" in finding.text
