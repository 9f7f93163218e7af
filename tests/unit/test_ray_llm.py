"""Ray Serve LLM on NPUs: what its configuration means with our names in place. Ray's own classes, without a cluster."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

import pytest

from vllm_ray_ascend.compat.ray_llm import npus_as_gpus, with_soc_names

pytestmark = pytest.mark.unit


class Types(Enum):
    A = "A10G"
    B = "Ascend910B"


@pytest.mark.parametrize("name", ["A10G", "Ascend910B", "Ascend910B3", "Ascend910_9391", "Ascend950DT_950x"])
def test_names_of_chips_are_accelerator_types(name: str) -> None:
    types = with_soc_names(Types)
    assert name in [each.value for each in types], "as LLMConfig looks it up"
    assert types(name).value == name


@pytest.mark.parametrize("name", ["H9", "ascend910B3", "", None, 910])
def test_other_names_stay_unknown(name: Any) -> None:
    types = with_soc_names(Types)
    assert name not in [each.value for each in types]
    with pytest.raises(ValueError, match="is not a valid Types"):
        types(name)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, {}),
        ({"bundle_per_worker": {"CPU": 1, "NPU": 0.5}}, {"bundle_per_worker": {"CPU": 1, "GPU": 0.5}}),
        (
            {"bundles": [{"NPU": 1}, {"GPU": 1}], "strategy": "SPREAD"},
            {"bundles": [{"GPU": 1}, {"GPU": 1}], "strategy": "SPREAD"},
        ),
        ({"bundle_per_worker": {"NPU": 1, "GPU": 0}}, {"bundle_per_worker": {"GPU": 1}}),
        ({"bundles": None, "bundle_per_worker": None}, {"bundles": None, "bundle_per_worker": None}),
    ],
)
def test_npus_are_read_as_gpus_and_what_is_given_stays(given: dict[str, Any], read: dict[str, Any]) -> None:
    before = json.dumps(given)
    assert npus_as_gpus(given) == read
    assert json.dumps(given) == before
