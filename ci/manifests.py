"""Check the Kubernetes manifests of docs/kuberay: `python -m ci.manifests [--crds FOLDER]`, part of `make lint`.

Pod templates and services are held against Kubernetes' own schema. Those of KubeRay, Kueue and Volcano are in no
package of the registries; with a FOLDER of the definitions from their repositories the check has these too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).resolve().parent.parent / "docs" / "kuberay"
KUBERNETES = "1.33"
_NPU_PREFIX = "huawei.com/Ascend"
_CUSTOM_GROUPS = ("ray.io", "kueue.x-k8s.io", "scheduling.volcano.sh")
"""Groups of resources that Kubernetes itself does not have."""


def documents(text: str) -> list[dict[str, Any]]:
    """Return the resources of a file, with YAML's anchors resolved as KubeRay sees them."""
    return [json.loads(json.dumps(each)) for each in yaml.safe_load_all(text)]


def cluster_of(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the Ray cluster that a resource describes; None if it describes none."""
    spec = document.get("spec", {})
    key = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document["kind"], "")
    found: Mapping[str, Any] | None = spec if key is None else spec.get(key)
    return found


def groups(cluster: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the groups of nodes with their names, the head first."""
    yield "head", cluster["headGroupSpec"]
    for group in cluster.get("workerGroupSpecs", ()):
        yield group["groupName"], group


def problems_of_group(name: str, group: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the NPUs of a group: Ray must get as many as Kubernetes gives."""
    given = 0
    for container in group["template"]["spec"]["containers"]:
        limits, requests = (container["resources"].get(key, {}) for key in ("limits", "requests"))
        npus = {key: value for key, value in limits.items() if key.startswith(_NPU_PREFIX)}
        if npus != {key: value for key, value in requests.items() if key.startswith(_NPU_PREFIX)}:
            yield f"{name}: limits and requests of NPUs differ: {limits}, {requests}"
        given += sum(int(value) for value in npus.values())
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        volumes = {volume["name"] for volume in group["template"]["spec"].get("volumes", ())}
        if mounted - volumes:
            yield f"{name}: no volume {', '.join(sorted(mounted - volumes))}"
    declared = ray_start_resources(group["rayStartParams"].get("resources", ""))
    if declared.get("NPU", 0) != given:
        yield f"{name}: Kubernetes gives {given} NPUs, declared to Ray are {declared.get('NPU', 0)}"
    if "num-gpus" in group["rayStartParams"]:
        yield f"{name}: with num-gpus Ray may not look for NPUs"


def problems_of_size(cluster: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with numbers of pods: only the autoscaler changes them."""
    for group in cluster.get("workerGroupSpecs", ()):
        if group["minReplicas"] < group["maxReplicas"] and not cluster.get("enableInTreeAutoscaling"):
            yield f"{group['groupName']}: without enableInTreeAutoscaling nobody adds pods up to maxReplicas"


def queue_resources(document: Mapping[str, Any]) -> set[str] | None:
    """Return the resources that a queue of Kueue or Volcano has; None for any other document."""
    if document["kind"] == "ClusterQueue":
        return {name for group in document["spec"]["resourceGroups"] for name in group["coveredResources"]}
    if document["kind"] == "Queue":
        return set(document["spec"]["capability"])
    return None


def requested_resources(cluster: Mapping[str, Any]) -> set[str]:
    """Return the names of the resources that the pods of a Ray cluster ask for."""
    pods = [group["template"]["spec"] for _, group in groups(cluster)]
    return {name for pod in pods for container in pod["containers"] for name in container["resources"]["requests"]}


def ray_start_resources(text: str) -> dict[str, float]:
    """Return the resources that `ray start --resources=TEXT` gets from a shell. Raises ValueError without JSON."""
    words = shlex.split(text)
    found = json.loads(words[0]) if len(words) == 1 else {}
    if text and not found:
        raise ValueError(f"resources: {text} is not a single shell argument of JSON")
    return dict(found)


def problems(text: str) -> list[str]:
    """Return what is wrong with the Ray clusters of a file."""
    clusters = [cluster for document in documents(text) if (cluster := cluster_of(document)) is not None]
    found = [each for cluster in clusters for name, group in groups(cluster) for each in problems_of_group(name, group)]
    found += [each for cluster in clusters for each in problems_of_size(cluster)]
    images = {
        container["image"]
        for cluster in clusters
        for _, group in groups(cluster)
        for container in group["template"]["spec"]["containers"]
    }
    return [*found, *([f"nodes have different images: {sorted(images)}"] if len(images) > 1 else [])]


def kubernetes_problems(text: str) -> list[str]:
    """Return the violations of Kubernetes' schema by the pods and services of a file."""
    import kubernetes_validate

    parts: list[dict[str, Any]] = []
    for document in documents(text):
        if not is_custom(document):
            parts.append(document)
        cluster = cluster_of(document)
        for name, group in groups(cluster) if cluster else ():
            parts.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **_pod(group["template"])})
    found = []
    for part in parts:
        try:
            kubernetes_validate.validate(part, KUBERNETES, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            found.append(f"{part['kind']} {part['metadata']['name']}: {str(error).splitlines()[0]}")
    return found


def is_custom(document: Mapping[str, Any]) -> bool:
    """Return whether a document is of a kind that Kubernetes itself does not have."""
    return str(document["apiVersion"]).partition("/")[0] in _CUSTOM_GROUPS


def read_schemas(crds: Path) -> dict[tuple[str, str], Any]:
    """Return the schema of each kind that is defined in a folder, by apiVersion and kind."""
    definitions = [yaml.safe_load(path.read_text())["spec"] for path in crds.glob("*.yaml")]
    return {
        (f"{each['group']}/{version['name']}", each["names"]["kind"]): strict(version["schema"]["openAPIV3Schema"])
        for each in definitions
        for version in each["versions"]
    }


def custom_problems(text: str, schemas: Mapping[tuple[str, str], Any]) -> list[str]:
    """Return the violations of the schemas of KubeRay's, Kueue's and Volcano's resources, and those without one."""
    import jsonschema

    found = []
    for document in filter(is_custom, documents(text)):
        schema = schemas.get((document["apiVersion"], document["kind"]))
        if schema is None:
            found.append(f"{document['kind']}: no definition of {document['apiVersion']}")
            continue
        errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
        found += [f"{error.json_path}: {error.message[:200]}" for error in errors]
    return found


def strict(schema: Any) -> Any:
    """Return ``schema`` with unknown fields rejected, as `kubectl apply` warns of them; a number may also be text."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    loose = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not loose:
        made["additionalProperties"] = False
    return made


def _pod(template: Mapping[str, Any]) -> dict[str, Any]:
    return {"spec": template["spec"]}


def main(arguments: list[str]) -> int:
    """Check every manifest; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m ci.manifests", description=__doc__.partition("\n")[0])
    parser.add_argument("--crds", type=Path, help="folder with CustomResourceDefinitions of KubeRay, Kueue and Volcano")
    options = parser.parse_args(arguments)
    files = sorted(MANIFESTS.glob("*.yaml"))
    schemas = read_schemas(options.crds) if options.crds else {}
    bad = 0
    for path in files:
        text = path.read_text()
        found = [*problems(text), *kubernetes_problems(text)]
        if schemas:
            found += custom_problems(text, schemas)
        for each in found:
            print(f"{path.name}: {each}")
        bad += len(found)
    print(f"{len(files)} manifests: {bad} problems")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
