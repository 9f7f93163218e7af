"""Paths that workers get, and the space in /dev/shm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.environment.paths import absolute_if_here, missing_extension, missing_path, use_absolute_paths
from vllm_ray_ascend.errors import ClusterResourceError
from vllm_ray_ascend.ipc.shared_memory import check_space, free_space

pytestmark = pytest.mark.unit

MIB = 2**20


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder "models/m" in the current folder, as an absolute path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    return tmp_path / "models" / "m"


def test_only_paths_that_exist_here_become_absolute(model: Path) -> None:
    assert absolute_if_here("models/m") == absolute_if_here("./models/../models/m") == str(model)
    for name in ("Qwen/Qwen3-8B", "models/other", str(model), "/nowhere", "", "s3://bucket/models/m"):
        assert absolute_if_here(name) == name


def config(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields)


def test_every_path_of_a_config_becomes_absolute(model: Path) -> None:
    given = config(
        model_config=config(model="models/m", tokenizer="models/m", hf_config_path=None, served_model_name="models/m"),
        speculative_config=config(
            model="models/m", draft_model_config=config(model="models/m", tokenizer="Qwen/Qwen3")
        ),
        load_config=config(download_dir="models"),
    )
    use_absolute_paths(given)
    assert vars(given.model_config) == {
        "model": str(model),
        "tokenizer": str(model),
        "hf_config_path": None,
        "served_model_name": "models/m",
    }
    assert given.speculative_config.model == given.speculative_config.draft_model_config.model == str(model)
    assert given.speculative_config.draft_model_config.tokenizer == "Qwen/Qwen3"
    assert given.load_config.download_dir == str(model.parent)


def test_a_config_without_model_or_speculation_is_left(model: Path) -> None:
    use_absolute_paths(config(model_config=None, speculative_config=None))
    use_absolute_paths(config(model_config=config(model="Qwen/Qwen3-8B")))


def test_a_node_without_the_model_is_named(model: Path) -> None:
    assert missing_path(str(model), "10.0.0.2") is None
    assert missing_path("Qwen/Qwen3-8B", "10.0.0.2") is None
    assert (missing_path(f"{model}/x", "10.0.0.2") or "").startswith(f"node 10.0.0.2 has no {model}/x, ")


def test_space_for_the_queue() -> None:
    assert check_space(160 * MIB, 200 * MIB, 160 * MIB) is None
    warning = check_space(60 * MIB, 64 * MIB, 160 * MIB) or ""
    assert warning.startswith("VRA-358: /dev/shm has 60 MiB free of 64 MiB, less than")
    assert "(160 MiB)" in warning
    with pytest.raises(ClusterResourceError, match=r"VRA-359: /dev/shm has 0 MiB free of 64 MiB: .*--shm-size"):
        check_space(MIB // 2, 64 * MIB, 160 * MIB)
    free, total = free_space()
    assert 0 <= free <= total


@pytest.mark.parametrize("missing", ["ours", "ours.extension"])
def test_the_module_of_an_extension_class_that_a_node_lacks(missing: str) -> None:
    error = ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    reason = missing_extension("ours.extension.Facts", error, "10.0.0.2")
    assert reason and reason.startswith(f"node 10.0.0.2 has no module {missing} for --worker-extension-cls ours.")


@pytest.mark.parametrize(
    ("extension", "error"),
    [
        ("ours.extension.Facts", ModuleNotFoundError("No module named 'numpy'", name="numpy")),
        ("ours.extension.Facts", ModuleNotFoundError("No module named 'our'", name="our")),
        ("ours.extension.Facts", ModuleNotFoundError("without a name")),
        ("ours.extension.Facts", ValueError("ours")),
        ("", ModuleNotFoundError("No module named 'ours'", name="ours")),
    ],
)
def test_other_failures_are_not_those_of_an_extension_class(extension: str, error: Exception) -> None:
    assert missing_extension(extension, error, "10.0.0.2") is None
