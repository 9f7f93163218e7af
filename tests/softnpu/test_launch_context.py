"""The launch context of an engine core that is a Ray actor: it arrives, and no log of Ray shows it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from vllm.v1.engine.utils import EngineZmqAddresses

from vllm_ray_ascend.control.server import ControlServer
from vllm_ray_ascend.engine.actors import NodeLocalEngineCore
from vllm_ray_ascend.engine.process import EngineLaunchContext

pytestmark = pytest.mark.integration

SECRET = "launch-secret-3318"


class Plain:
    """Replaces an engine core, which needs a model."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


class Engine(NodeLocalEngineCore, Plain):
    def get_received(self) -> tuple[str | None, bool]:
        return os.environ.get("HF_TOKEN"), self._control is not None


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray of this test's own, and where it logs: a short path, for Ray's sockets lie beside it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="vra") as folder:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield Path(folder)
        ray.shutdown()


def test_an_engine_core_has_its_control_connection_and_secrets(logs: Path) -> None:
    server = ControlServer("127.0.0.1", 60, lambda loss: None)
    addresses: Any = EngineZmqAddresses([], [])
    addresses.launch_context = EngineLaunchContext(server.address_json(), {"HF_TOKEN": SECRET})
    variables = {"env_vars": {"NO_SECRET": "1"}}
    engine = ray.remote(Engine).options(runtime_env=variables).remote(addresses=addresses, dp_rank=3)
    assert ray.get(engine.get_received.remote(), timeout=300) == (SECRET, True)
    assert server.connected_ranks() == [3]
    server.close()
    texts = {path.name: path.read_text(errors="replace") for path in logs.glob("session_*/logs/*") if path.is_file()}
    assert "NO_SECRET" in texts["runtime_env_agent.log"], "Ray logs variables no longer"
    assert not [name for name, text in texts.items() if SECRET in text or server.address.token in text]
