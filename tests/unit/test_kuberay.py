"""The manifests of docs/kuberay: Ray is told of the NPUs that Kubernetes gives, in a form that survives a shell."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ci.manifests import MANIFESTS, cluster_of, documents, groups, problems, strict, told_to_ray

pytestmark = pytest.mark.unit

FILES = sorted(MANIFESTS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_to_mend(path: Path) -> None:
    assert problems(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_two_groups_of_eight(path: Path) -> None:
    (cluster,) = [found for each in documents(path.read_text()) if (found := cluster_of(each)) is not None]
    told = {name: told_to_ray(group["rayStartParams"]["resources"]) for name, group in groups(cluster)}
    assert told == {"head": {"NPU": 8}, "npu": {"NPU": 8}}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (r'"{\"NPU\": 8}"', r'"{\"NPU\": 4}"', "Kubernetes gives 8 NPUs, Ray is told of 4"),
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
def test_what_is_wrong_is_said(old: str, new: str, said: str) -> None:
    text = (MANIFESTS / "raycluster.yaml").read_text()
    found = problems(text.replace(old, new))
    assert said in "\n".join(found)
    assert bool(found) == bool(said)


def test_quotes_that_a_shell_takes_away_are_missed() -> None:
    """KubeRay issue 1984: `ray start --resources={"NPU": 1}` becomes two words."""
    assert told_to_ray(yaml.safe_load("""'"{\\"NPU\\": 1}"'""")) == {"NPU": 1}
    with pytest.raises(ValueError, match="not one word"):
        told_to_ray('{"NPU": 1}')


def test_unknown_fields_are_refused() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}}, "free": {"type": "object"}},
    }
    made = strict(schema)
    assert made["additionalProperties"] is False and made["properties"]["a"]["additionalProperties"] is False
    assert "additionalProperties" not in made["properties"]["free"]
    assert "additionalProperties" not in strict({**schema, "x-kubernetes-preserve-unknown-fields": True})
