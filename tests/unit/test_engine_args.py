"""What is refused of an engine's command line before vLLM makes its config."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ray_ascend.engine.engine_args import check_model_path
from vllm_ray_ascend.errors import SettingError

pytestmark = pytest.mark.unit


def test_a_path_that_does_not_exist_is_refused_with_the_last_folder_that_does(tmp_path: Path) -> None:
    missing = tmp_path / "models" / "zen"
    with pytest.raises(
        SettingError, match=f"VRA-171: there is no folder or file {missing} on node .*, where {tmp_path} is"
    ):
        check_model_path(str(missing))


def test_paths_that_exist_and_names_of_models_are_left_to_vllm(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    for model in (str(tmp_path), str(file), "Qwen/Qwen3-8B", "s3://bucket/model", "relative/folder"):
        check_model_path(model)
