"""Which engines can be scaled, and what the manager of engine cores does about lists that upstream slices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.elastic_ep import admission
from vllm_ray_ascend.errors import ElasticEPError, ElasticSizeError

pytestmark = pytest.mark.unit

SWITCH = "VLLM_RAY_ASCEND_ELASTIC_EP"


def make_config(**changes: Any) -> Any:
    """Return what the check reads of a VllmConfig that it accepts; ``changes`` by ``owner__name``."""
    balancing = SimpleNamespace(use_async=False, policy="default", communicator=None)
    parallel = SimpleNamespace(
        enable_elastic_ep=True,
        data_parallel_backend="ray",
        data_parallel_size=2,
        worker_cls="auto",
        prefill_context_parallel_size=1,
        eplb_config=balancing,
    )
    config = SimpleNamespace(
        parallel_config=parallel,
        use_v2_model_runner=False,
        quant_config=None,
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        model_config=SimpleNamespace(enable_sleep_mode=False),
        additional_config={},
    )
    owners = {"config": config, "parallel": parallel, "balancing": balancing, "model": config.model_config}
    for name, value in changes.items():
        owner, _, attribute = name.partition("__")
        setattr(owners[owner], attribute, value)
    return config


@pytest.fixture(autouse=True)
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")


def test_a_fitting_engine_has_no_obstacle() -> None:
    assert admission.obstacle(make_config()) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parallel__data_parallel_backend": "mp"}, "other than ray"),
        ({"parallel__data_parallel_size": 1}, "--data-parallel-size 1"),
        ({"parallel__worker_cls": "mine.Worker"}, "--worker-cls mine.Worker"),
        ({"parallel__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"balancing__use_async": True}, "use_async true"),
        ({"balancing__policy": "stair"}, "--eplb-config.policy stair"),
        ({"balancing__communicator": "nixl"}, "--eplb-config.communicator nixl"),
        ({"config__use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=1"),
        ({"config__quant_config": object()}, "a quantised model"),
        ({"config__speculative_config": object()}, "--speculative-config"),
        ({"config__lora_config": object()}, "--enable-lora"),
        ({"config__kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"model__enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"config__additional_config": {"eplb_config": {"dynamic_eplb": True}}}, "additional_config eplb_config"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], reason: str) -> None:
    assert reason in admission.obstacle(make_config(**change))


def test_a_switch_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_EXECUTOR", "upstream")
    assert admission.obstacle(make_config()) == "VLLM_RAY_ASCEND_EXECUTOR=upstream"


def test_ranks_that_are_lost_may_be_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RAY_ASCEND_RECOVER", "1")
    assert admission.obstacle(make_config()) == ""


def test_a_communicator_that_was_selected_automatically_is_no_obstacle() -> None:
    config = make_config(balancing__communicator="hixl")
    config.parallel_config.eplb_config._vllm_ascend_eplb_auto_selected = True
    assert admission.obstacle(config) == ""


def test_without_the_switch_the_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH)
    with pytest.raises(ElasticEPError, match=r"VRA-150.*VLLM_RAY_ASCEND_ELASTIC_EP=1 vllm serve MODEL"):
        admission.check(make_config())


def test_only_elastic_engines_are_elastic() -> None:
    assert admission.is_elastic(make_config())
    assert not admission.is_elastic(make_config(parallel__enable_elastic_ep=False))
    assert not admission.is_elastic(SimpleNamespace(parallel_config=SimpleNamespace()))  # an older vLLM


@pytest.mark.parametrize(("ranks", "given", "code"), [(1, 0, "VRA-168"), (2, 3, "VRA-170"), (3, 3, ""), (2, 0, "")])
def test_sizes(ranks: int, given: int, code: str) -> None:
    if not code:
        admission.check_size(ranks, given)
        return
    with pytest.raises(ElasticSizeError, match=code):
        admission.check_size(ranks, given)


def test_no_rank_joins_after_the_weights_were_changed() -> None:
    assert "(update_weights)" in admission.weights_obstacle("update_weights", 2, 4)
    assert admission.weights_obstacle("update_weights", 4, 2) == admission.weights_obstacle("", 2, 4) == ""
