"""What an engine core that is a Ray actor is told in confidence: it arrives, and no log of Ray shows it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from vllm.v1.engine.utils import EngineZmqAddresses

from vllm_ray_ascend.engine.actors import _OnItsNode
from vllm_ray_ascend.engine.process import Confided
from vllm_ray_ascend.lifecycle.hub import Hub

pytestmark = pytest.mark.integration

SECRET = "confided-secret-3318"


class Plain:
    """In place of an engine core, which needs a model."""

    def __init__(self, **told: Any) -> None:
        self.told = told


class Engine(_OnItsNode, Plain):
    def seen(self) -> tuple[str | None, bool]:
        return os.environ.get("HF_TOKEN"), self._lifeline is not None


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray of this test's own, and where it logs: a short path, for Ray's sockets lie beside it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="vra") as folder:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield Path(folder)
        ray.shutdown()


def test_an_engine_core_has_its_lifeline_and_secrets(logs: Path) -> None:
    hub = Hub("127.0.0.1", 60, lambda loss: None)
    addresses: Any = EngineZmqAddresses([], [])
    addresses.confided = Confided(hub.text(), {"HF_TOKEN": SECRET})
    variables = {"env_vars": {"NO_SECRET": "1"}}
    engine = ray.remote(Engine).options(runtime_env=variables).remote(addresses=addresses, dp_rank=3)
    assert ray.get(engine.seen.remote(), timeout=300) == (SECRET, True)
    assert hub.ranks() == [3]
    hub.close()
    texts = {path.name: path.read_text(errors="replace") for path in logs.glob("session_*/logs/*") if path.is_file()}
    assert "NO_SECRET" in texts["runtime_env_agent.log"], "Ray logs variables no longer"
    assert not [name for name, text in texts.items() if SECRET in text or hub.address.token in text]
