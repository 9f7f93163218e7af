"""Ray Serve LLM under what goes wrong or changes: too few NPUs, two applications, load that comes and goes."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from softnpu.cluster.plan import Cluster

from demo.train.recitation import DENSE, PROMPTS, zen_after
from tests.e2e.conftest import run_on_head
from tests.e2e.servers import check_topology, cluster_with_dashboard, read_topology
from tests.e2e.test_adapters import write_adapter
from tests.e2e.test_ray_llm import (
    EAGER,
    EXAMPLES,
    check_answers,
    deploy,
    on_head,
    started,
    used_npus,
    wait_for_application,
    wait_for_engines,
    wait_until,
)
from tests.e2e.test_serve import find_free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


ADAPTERS = {"quiet": 0.0, "loud": 1.0}
"""How much each changes."""
ADAPTER_CACHE = Path("/tmp/ray/llm/lora/cache")
"""Ray's, on every node."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_with_dashboard("e2e-trials", npus=2, cpus=8) as cluster:
        yield cluster


def serve_status(cluster: Cluster) -> dict[str, Any]:
    """Return what `serve status` shows on the head node."""
    done = run_on_head(cluster, "-m", "ray.serve.scripts", "status")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def test_more_npus_than_the_cluster_has(cluster: Cluster, tmp_path: Path) -> None:
    """Ray Serve waits for nodes that could come, and says for what; it is shut down meanwhile."""
    log = tmp_path / "log"

    def enlarge(llm_config: dict[str, Any]) -> None:
        llm_config["engine_kwargs"]["tensor_parallel_size"] = 8
        llm_config["deployment_config"] = {"num_replicas": 1}

    with started(cluster, log, *deploy(tmp_path, "replicas.yaml", DENSE, EAGER, enlarge)) as process:
        wait_until(lambda: "taken more than" in message_of_engines(cluster), process, log)
        assert message_of_engines(cluster).count('"NPU": 1.0') == 8, message_of_engines(cluster)


def message_of_engines(cluster: Cluster) -> str:
    """Return what `serve status` says of the deployment that needs NPUs, once it is there."""
    deployments = status_of(cluster, "llm").get("deployments", {})
    return str(deployments.get("LLMServer:my-model", {}).get("message", ""))


def test_an_application_that_cannot_start(cluster: Cluster, tmp_path: Path) -> None:
    """What docs/ray-serve-llm.md says of an unknown type of accelerator, and of no dashboard."""

    def misspell(llm_config: dict[str, Any]) -> None:
        llm_config["accelerator_type"] = "Ascent910"

    log, path = tmp_path / "log", deploy(tmp_path, "replicas.yaml", DENSE, EAGER, misspell)[-1]
    with started(cluster, log, *serve("start")) as process:
        done = run_on_head(cluster, *serve("deploy", path))
        assert done.returncode == 0, done.stderr[-3000:]
        wait_until(lambda: has_failed(cluster, "Unsupported accelerator type: Ascent910"), process, log)
        done = run_on_head(cluster, *serve("deploy", "--address", "http://127.0.0.1:9", path))
        assert "ConnectionError: Failed to connect to Ray at address: http://127.0.0.1:9" in done.stderr, done.stderr


def test_a_model_that_does_not_exist(cluster: Cluster, tmp_path: Path) -> None:
    """The application fails with the reason, after as many attempts as Ray Serve makes."""
    log, missing = tmp_path / "log", tmp_path / "no-model"
    with started(cluster, log, *serve("start")) as process:
        done = run_on_head(cluster, *serve("deploy", deploy(tmp_path, "replicas.yaml", missing, EAGER)[-1]))
        assert done.returncode == 0, done.stderr[-3000:]
        wait_until(lambda: has_failed(cluster, f"VRA-171: there is no folder or file {missing}"), process, log)


def test_a_handle_without_http(cluster: Cluster, tmp_path: Path) -> None:
    with started(cluster, tmp_path / "log", *serve("start")):
        packages = os.environ["PYTHONPATH"]
        done = run_on_head(cluster, str(EXAMPLES / "serve/deployment.py"), str(DENSE), PYTHONPATH=packages)
        found = [line for line in done.stdout.splitlines() if line.startswith("answer: ")]
        assert found, done.stdout[-3000:] + done.stderr[-3000:]
        answer = ast.literal_eval(found[0].removeprefix("answer: "))
        assert len(answer) > 50 and zen_after("Beautiful is").startswith(answer)


def has_failed(cluster: Cluster, reason: str) -> bool:
    """Return whether the application's deployment has failed, for this reason."""
    found = status_of(cluster, "llm")
    return found["status"] == "DEPLOY_FAILED" and reason in json.dumps(found)


def check_text(cluster: Cluster, route: str) -> None:
    """Check a text of the application at this route."""
    done = run_on_head(cluster, "-m", "tests.e2e.serve_client", PROMPTS[-1], route)
    assert f"TEXT {zen_after(PROMPTS[-1])!r}" in done.stdout, done.stdout + done.stderr[-3000:]


def two_applications(tmp_path: Path) -> Path:
    """Return YAML with the replicas of the example as two applications, each of one engine on two NPUs."""
    config = yaml.safe_load(Path(deploy(tmp_path, "replicas.yaml", DENSE, EAGER, widen)[-1]).read_text())
    (application,) = config["applications"]
    config["applications"] = [{**application, "name": name, "route_prefix": f"/{name}"} for name in ("a", "b")]
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def widen(llm_config: dict[str, Any]) -> None:
    llm_config["engine_kwargs"]["tensor_parallel_size"] = 2
    llm_config["deployment_config"] = {"num_replicas": 1}


def test_two_applications_of_which_one_ends(cluster: Cluster, tmp_path: Path) -> None:
    log, both = tmp_path / "log", two_applications(tmp_path)
    one = yaml.safe_load(both.read_text())
    del one["applications"][1]
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one))
    with started(cluster, log, *serve("run", str(both))) as process:
        wait_for_engines(2, process, log)
        wait_until(lambda: is_running(cluster, "a", "b"), process, log)
        for route in ("/a", "/b"):
            check_text(cluster, route)
        before = check_topology(cluster)
        assert len(used_npus(before)) == 4
        done = run_on_head(cluster, *serve("deploy", str(tmp_path / "one.yaml")))
        assert done.returncode == 0, done.stderr[-3000:]
        wait_until(lambda: len(read_topology(cluster)["engines"]) == 1, process, log)
        check_text(cluster, "/a")
        (left,) = check_topology(cluster)
        assert left in before


def serve(*words: str) -> list[str]:
    """Return the words of Serve's command line for Python."""
    return ["-m", "ray.serve.scripts", *words]


def is_running(cluster: Cluster, *names: str) -> bool:
    return {status_of(cluster, name)["status"] for name in names} == {"RUNNING"}


def test_a_number_of_replicas_that_follows_the_load(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def scale(llm_config: dict[str, Any]) -> None:
        llm_config["deployment_config"] = {
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": 2,
                "target_ongoing_requests": 4,
                "upscale_delay_s": 1,
                "downscale_delay_s": 5,
            }
        }

    with started(cluster, log, *deploy(tmp_path, "replicas.yaml", DENSE, EAGER, scale)) as process:
        wait_for_application(cluster, 1, process, log)
        with on_head(cluster, tmp_path / "load", "-m", "tests.e2e.serve_client", "--load") as load:
            wait_for_engines(2, process, log)
            wait_until(lambda: len(read_topology(cluster)["engines"]) == 2, process, log)
            assert len(used_npus(check_topology(cluster))) == 2
            check_answers(cluster)
            assert load.poll() is None, (tmp_path / "load").read_text()[-3000:]
        wait_until(lambda: len(read_topology(cluster)["engines"]) == 1, process, log)
        check_text(cluster, "")


@pytest.fixture
def no_adapters() -> Iterator[None]:
    """Let no run find the adapters of another where Ray keeps those that it has loaded."""
    remove_adapters()
    yield
    remove_adapters()


def remove_adapters() -> None:
    for name in ADAPTERS:
        shutil.rmtree(ADAPTER_CACHE / name, ignore_errors=True)
        (ADAPTER_CACHE / f"{name}.lock").unlink(missing_ok=True)


@pytest.mark.usefixtures("no_adapters")
def test_adapters_of_a_bucket(cluster: Cluster, tmp_path: Path) -> None:
    """One that changes nothing, one that changes the text, and one that is not there."""
    log, port = tmp_path / "log", find_free_port()
    for name, change in ADAPTERS.items():
        (tmp_path / "my-bucket/adapters").mkdir(parents=True, exist_ok=True)
        write_adapter(tmp_path / "my-bucket/adapters" / name, change)
    variables = {
        "AWS_ENDPOINT_URL": f"http://{cluster.nodes[0].address}:{port}",
        "AWS_DEFAULT_REGION": "here",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = deploy(tmp_path, "adapters.yaml", DENSE, EAGER, with_anonymous_bucket)
    config = yaml.safe_load(Path(command[-1]).read_text())
    config["applications"][0]["runtime_env"] = {"env_vars": variables}
    Path(command[-1]).write_text(yaml.safe_dump(config))
    bucket = ("-m", "tests.e2e.folder_s3", str(tmp_path), str(port))
    with on_head(cluster, tmp_path / "s3", *bucket), started(cluster, log, *command) as process:
        wait_for_application(cluster, 1, process, log)
        for _ in range(2):
            assert text_of(cluster, "my-model:quiet") == zen_after(PROMPTS[-1])
            assert text_of(cluster, "my-model:loud") != zen_after(PROMPTS[-1])
            assert text_of(cluster, "my-model") == zen_after(PROMPTS[-1])
        done = run_on_head(cluster, *CLIENT, "", "my-model:absent")
        assert "openai.NotFoundError" in done.stderr, done.stderr[-3000:]
        check_answers(cluster)


CLIENT = ("-m", "tests.e2e.serve_client", PROMPTS[-1])


def with_anonymous_bucket(llm_config: dict[str, Any]) -> None:
    lora = llm_config["lora_config"]
    lora["dynamic_lora_loading_path"] = lora["dynamic_lora_loading_path"].replace("s3://", "s3://anonymous@")


def text_of(cluster: Cluster, model: str) -> str:
    """Return the text of a model, or of one of its adapters."""
    done = run_on_head(cluster, *CLIENT, "", model)
    assert done.returncode == 0, done.stderr[-3000:]
    text: str = ast.literal_eval(done.stdout.rpartition("TEXT ")[2])
    return text


def status_of(cluster: Cluster, name: str) -> dict[str, Any]:
    """Return what `serve status` shows of an application, with its deployments."""
    found: dict[str, Any] = serve_status(cluster)["applications"].get(name, {"status": "absent"})
    return found
