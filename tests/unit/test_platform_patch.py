"""Our members on a platform class: which, once, and only where the names are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.errors import DeviceMappingError, UpstreamChangedError
from vllm_ray_ascend.platform_patch import is_patched, patch_platform

pytestmark = pytest.mark.unit


def platform_class() -> Any:
    class Platform:
        ray_device_key = ""
        device_control_env_var = "PLACEHOLDER"
        ray_noset_device_env_vars = ("RAY_EXPERIMENTAL_NOSET_OTHER",)
        checked: list[tuple[str, Any]] = []  # noqa: RUF012

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            cls.checked.append((cls.__name__, vllm_config))

    return Platform


def test_a_platform_gets_what_ray_needs() -> None:
    platform = platform_class()
    patch_platform(platform)
    assert is_patched(platform)
    assert platform.ray_device_key == "NPU"
    assert platform.device_control_env_var == "ASCEND_RT_VISIBLE_DEVICES"
    assert platform.ray_noset_device_env_vars == [
        "RAY_EXPERIMENTAL_NOSET_OTHER",
        "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES",
    ]


def test_the_platforms_own_check_still_runs_once_with_its_class() -> None:
    platform = platform_class()
    patch_platform(platform)
    patch_platform(platform)
    config = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend="mp"))
    platform.check_and_update_config(config)
    assert platform.checked == [("Platform", config)]


def test_a_subclass_is_patched_without_its_parent() -> None:
    parent = platform_class()
    child = type("Child", (parent,), {})
    patch_platform(child)
    assert is_patched(child)
    assert not is_patched(parent)
    assert parent.ray_device_key == ""


def test_a_patched_parent_does_not_make_its_subclass_ours() -> None:
    parent = platform_class()
    patch_platform(parent)
    assert not is_patched(type("Child", (parent,), {}))


def test_a_logical_number_becomes_a_visible_one_or_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = platform_class()
    platform.device_id_to_physical_device_id = classmethod(lambda _, device_id: [5, 7][device_id])
    platform.logical_device_id_to_visible_device_id = classmethod(lambda _, device_id: -1)
    patch_platform(platform)
    assert platform.logical_device_id_to_visible_device_id(1) == 7
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    assert platform.logical_device_id_to_visible_device_id(0) == 1
    with pytest.raises(DeviceMappingError, match="Physical NPU 7 is not visible here"):
        platform.logical_device_id_to_visible_device_id(1)


def test_vllm_0_23_has_no_such_function_and_gets_none() -> None:
    platform = platform_class()
    patch_platform(platform)
    assert not hasattr(platform, "logical_device_id_to_visible_device_id")


@pytest.mark.parametrize("name", ["ray_device_key", "check_and_update_config"])
def test_a_name_that_is_gone_is_an_error_that_names_it(name: str) -> None:
    platform = platform_class()
    delattr(platform, name)
    with pytest.raises(UpstreamChangedError, match=rf"VRA-102: .*\.{name} is gone"):
        patch_platform(platform)
    assert not is_patched(platform)
