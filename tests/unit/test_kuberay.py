"""The manifests of docs/kuberay: the NPUs that Kubernetes gives are declared to Ray, quoted for a shell."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ci.manifests import (
    MANIFESTS,
    cluster_of,
    custom_problems,
    documents,
    groups,
    is_custom,
    problems,
    queue_resources,
    ray_start_resources,
    requested_resources,
    strict,
)

pytestmark = pytest.mark.unit

FILES = sorted(MANIFESTS.glob("*.yaml"))
QUEUES = [MANIFESTS / "kueue.yaml", MANIFESTS / "volcano.yaml"]
CLUSTERS = [path for path in FILES if path not in QUEUES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifests_have_no_problems(path: Path) -> None:
    assert problems(path.read_text()) == []


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_two_groups_of_eight(path: Path) -> None:
    (cluster,) = [found for each in documents(path.read_text()) if (found := cluster_of(each)) is not None]
    declared = {name: ray_start_resources(group["rayStartParams"]["resources"]) for name, group in groups(cluster)}
    assert declared == {"head": {"NPU": 8}, "npu": {"NPU": 8}}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (r'"{\"NPU\": 8}"', r'"{\"NPU\": 4}"', "Kubernetes gives 8 NPUs, declared to Ray are 4"),
        ("readOnly: true, name: shm", "", ""),
        ("name: driver, hostPath", "name: other, hostPath", "no volume driver"),
        (
            'rayStartParams:\n        resources: \'"{\\"NPU\\": 8}"\'',
            "rayStartParams: {num-gpus: '8'}",
            "may not look for",
        ),
        (
            "image: your-registry/vllm-ray-ascend:0.30.0rc2\n              env: *env",
            "image: other\n              env: *env",
            "images",
        ),
    ],
)
def test_problems_are_reported(old: str, new: str, expected: str) -> None:
    text = (MANIFESTS / "raycluster.yaml").read_text()
    found = problems(text.replace(old, new))
    assert expected in "\n".join(found)
    assert bool(found) == bool(expected)


def test_only_an_autoscaler_adds_pods() -> None:
    text = (MANIFESTS / "autoscaling.yaml").read_text()
    assert "nobody adds pods" in "\n".join(problems(text.replace("enableInTreeAutoscaling: true", "suspend: false")))


@pytest.mark.parametrize("path", QUEUES, ids=lambda path: path.name)
def test_a_queue_has_every_resource_that_a_job_asks_for(path: Path) -> None:
    """Kueue never admits a job that asks for a resource which its queue does not name."""
    (cluster,) = [found for each in documents((MANIFESTS / "rayjob.yaml").read_text()) if (found := cluster_of(each))]
    (queue,) = [names for each in documents(path.read_text()) if (names := queue_resources(each)) is not None]
    assert queue == requested_resources(cluster) == {"cpu", "memory", "huawei.com/Ascend910"}


def test_a_kind_without_a_definition_is_reported() -> None:
    text = (MANIFESTS / "volcano.yaml").read_text()
    assert all(is_custom(each) for each in documents(text))
    assert custom_problems(text, {}) == ["Queue: no definition of scheduling.volcano.sh/v1beta1"]
    schemas = {("scheduling.volcano.sh/v1beta1", "Queue"): strict({"type": "object", "properties": {"spec": {}}})}
    assert "'apiVersion', 'kind', 'metadata' were unexpected" in custom_problems(text, schemas)[0]


def test_quotes_that_a_shell_removes_are_required() -> None:
    """KubeRay issue 1984: `ray start --resources={"NPU": 1}` becomes two words."""
    assert ray_start_resources(yaml.safe_load("""'"{\\"NPU\\": 1}"'""")) == {"NPU": 1}
    with pytest.raises(ValueError, match="not a single shell argument"):
        ray_start_resources('{"NPU": 1}')


def test_unknown_fields_are_rejected() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}}, "free": {"type": "object"}},
    }
    made = strict(schema)
    assert made["additionalProperties"] is False and made["properties"]["a"]["additionalProperties"] is False
    assert "additionalProperties" not in made["properties"]["free"]
    assert "additionalProperties" not in strict({**schema, "x-kubernetes-preserve-unknown-fields": True})
