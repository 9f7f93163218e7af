"""An engine's process of a Ray job: its script has joined Ray with an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest
import ray

pytestmark = pytest.mark.integration

LIMIT_S = 300
JOB = {"env_vars": {"OF_JOB": "1", "OF_BOTH": "job"}}
SCRIPT = {"env_vars": {"OF_JOB": "1", "OF_BOTH": "script", "OF_SCRIPT": "2"}}
"""As Ray merges the job's environment with that of the script's ray.init()."""
ENGINE = f"""
import os, ray
from types import SimpleNamespace
from vllm_ray_ascend.cluster.connect import connect
connect(SimpleNamespace(ray_runtime_env={SCRIPT}))
def read():
    return [os.environ.get(name) for name in ("OF_JOB", "OF_BOTH", "OF_SCRIPT")]
print("FOUND", ray.get(ray.remote(read).remote()))
"""


def test_workers_have_the_environment_of_the_job_and_of_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM hands the script's environment to its engine's process, which has the job's from Ray as well."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="vra") as folder:
        context = ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        variables = {
            "RAY_ADDRESS": context.address_info["gcs_address"],
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": JOB, "metadata": {"job_submission_id": "mine"}}),
        }
        engine = subprocess.run(
            [sys.executable, "-c", ENGINE],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        ray.shutdown()
    assert "FOUND ['1', 'script', '2']" in engine.stdout, engine.stderr[-3000:]
