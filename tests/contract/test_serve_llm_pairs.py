"""docs/ray-serve-llm.md says with which vLLM each Ray's Serve LLM can be imported; the released sources decide."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ci.matrix import read
from ci.releases import fetch
from vllm_ray_ascend.doctor.serve_llm import IMPORTERS, files_of, names_imported, names_missing

pytestmark = pytest.mark.unit

PAGE = Path(__file__).resolve().parents[2] / "docs/ray-serve-llm.md"
ROW = re.compile(r"^\| (2\.\d+)(?: to (2\.\d+))? \| (0\.\d+)(?: to (0\.\d+))? \|", re.MULTILINE)


def test_the_page_names_the_releases_that_fit() -> None:
    matrix = read()
    importers = [f"ray/{file}" for file in IMPORTERS]
    rays = {
        version: fetch("ray", version, importers).folder / "ray"
        for version in matrix.versions("ray")
        if minor(version) >= 56
    }
    names = {
        ray: {name for file in IMPORTERS for name in names_imported(folder / file)} for ray, folder in rays.items()
    }
    assert all(names.values())
    modules = {module for found in names.values() for module, _ in found}
    documented = pairs_of(PAGE.read_text())
    for vllm in matrix.versions("vllm"):
        folder = (
            fetch("vllm", vllm, [f"vllm/{file}" for module in modules for file in files_of(module)]).folder / "vllm"
        )
        for version, ray in rays.items():
            missing = names_missing(ray, folder)
            assert ((minor(version), minor(vllm)) in documented) == (not missing), (version, vllm, missing)


def minor(version: str) -> int:
    return int(version.split(".")[1])


def pairs_of(text: str) -> set[tuple[int, int]]:
    """Return the pairs of Ray's and vLLM's minor numbers in the table of the page."""
    rows = [[minor(version) if version else 0 for version in row] for row in ROW.findall(text)]
    return {
        (ray, vllm)
        for first_ray, last_ray, first_vllm, last_vllm in rows
        for ray in range(first_ray, (last_ray or first_ray) + 1)
        for vllm in range(first_vllm, (last_vllm or first_vllm) + 1)
    }
