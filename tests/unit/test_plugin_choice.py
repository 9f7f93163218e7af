"""What the entry points decide, and that they cost nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest

from vllm_ray_ascend.executor.rank_report import RankReport, format_ready_line
from vllm_ray_ascend.plugin import is_sole_platform_plugin, skipped_ascend_plugins

pytestmark = pytest.mark.unit

OWN = [
    EntryPoint("ascend_model", "vllm_ascend:register_model", "vllm.general_plugins"),
    EntryPoint("ascend_kv_connector", "vllm_ascend:register_connector", "vllm.general_plugins"),
]
OTHER = EntryPoint("other", "vllm_ascendant:register", "vllm.general_plugins")


@pytest.mark.parametrize("group", ["vllm.platform_plugins", "vllm.general_plugins"])
def test_the_installed_package_has_both_entry_points(group: str) -> None:
    assert [plugin.module for plugin in entry_points(group=group, name="ray_ascend")] == ["vllm_ray_ascend.plugin"]


@pytest.mark.parametrize(
    ("plugins", "alone"),
    [
        (None, False),
        ("", False),
        ("ray_ascend", True),
        ("ascend,ray_ascend", False),
        ("ascend", False),
        ("x,ray_ascend", True),
    ],
)
def test_selected_alone(plugins: str | None, alone: bool) -> None:
    assert is_sole_platform_plugin({} if plugins is None else {"VLLM_PLUGINS": plugins}) is alone


def test_left_out_are_vllm_ascends_own_unless_some_were_chosen() -> None:
    assert skipped_ascend_plugins([*OWN, OTHER], {"VLLM_PLUGINS": "ray_ascend"}) == OWN
    assert skipped_ascend_plugins([*OWN, OTHER], {"VLLM_PLUGINS": "ray_ascend,ascend_model"}) == []


def test_the_ready_line() -> None:
    ranks = [RankReport(1, "10.0.0.2", 0, 4, 11), RankReport(0, "10.0.0.1", 1, 1, 10)]
    assert format_ready_line("0.1.0", {"vLLM": "0.30.0", "Ray": "2.60.0"}, ranks) == (
        "vllm-ray-ascend 0.1.0 ready: vLLM 0.30.0, Ray 2.60.0; 2 nodes, 2 NPUs; "
        "rank 0 -> 10.0.0.1 NPU 1 (physical 1), rank 1 -> 10.0.0.2 NPU 0 (physical 4)"
    )


LIGHT = """
import sys
import vllm_ray_ascend, vllm_ray_ascend.cli.main, vllm_ray_ascend.executor.rank_report
import vllm_ray_ascend.cluster.connect, vllm_ray_ascend.plugin as plugin
{calls}
loaded = {{name for name, module in sys.modules.items() if module}}
heavy = {{"torch", "ray", "vllm", "vllm_ascend", "torch_npu", "numpy"}} & loaded
assert not heavy, heavy
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_imports_nothing_heavy() -> None:
    run(LIGHT.format(calls="plugin.platform()"))


def test_silent_and_light_without_vllm_ascend() -> None:
    calls = """
sys.modules["vllm_ascend"] = None
before = list(sys.meta_path)
assert plugin.platform() is None and plugin.general() is None
assert sys.meta_path == before
"""
    run(LIGHT.format(calls=calls))
