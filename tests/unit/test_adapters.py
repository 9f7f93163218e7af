"""When an API server asks workers for the files of a LoRA adapter, and what a worker finds."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_ray_ascend.engine.adapters import AdapterUse, _check_first, _record_load, check_adapter, missing_files
from vllm_ray_ascend.errors import AdapterError

pytestmark = pytest.mark.unit


def test_an_adapter_is_read_again_where_it_was_not_loaded_or_others_may_have_taken_its_place() -> None:
    use = AdapterUse(loaded={1, 2}, used={1, 2})
    assert use.may_be_read_again(3, capacity=8)  # of a request without add_lora before
    assert not use.may_be_read_again(1, capacity=2)
    use.used.add(3)
    assert use.may_be_read_again(1, capacity=2) and not use.may_be_read_again(1, capacity=3)
    assert use.may_be_read_again(1, capacity=0)  # with other API servers, whose adapters are not known here


def test_a_node_needs_the_configuration_and_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_files(str(tmp_path / "gone")) == missing_files(str(tmp_path)) == "adapter_config.json"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert missing_files(str(tmp_path)) == "adapter_model.safetensors"
    with pytest.raises(AdapterError, match=f"VRA-387: LoRA adapter mine .* node 10.0.0.2 has no .* in {tmp_path}"):
        check_adapter("mine", str(tmp_path), "10.0.0.2")
    (tmp_path / "adapter_model.bin").touch()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for path in (str(tmp_path), f"~/{tmp_path.name}", "owner/name-on-a-hub"):
        check_adapter("mine", path, "10.0.0.2")


@pytest.fixture
def not_found(monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    """vLLM's error, of its own file: vLLM itself loads only where there are NPUs."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None and vllm.origin is not None
    spec = importlib.util.spec_from_file_location("vllm.exceptions", Path(vllm.origin).with_name("exceptions.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", module)
    found: type[Exception] = module.VLLMNotFoundError
    return found


def lora_request(name: str, number: int, path: str, tensorizer: dict[str, str] | None = None) -> Any:
    """Return the fields of vLLM's LoRARequest that count."""
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path, tensorizer_config_dict=tensorizer)


class Engine:
    """What a request meets of vLLM's AsyncLLM, with one worker, which can keep ``max_cpu_loras`` adapters."""

    def __init__(self, max_cpu_loras: int) -> None:
        parallel = SimpleNamespace(distributed_executor_backend="ray", _api_process_count=1)
        lora = SimpleNamespace(max_cpu_loras=max_cpu_loras)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, lora_config=lora)
        self.broken = False

    async def collective_rpc(self, method: str, args: tuple[str, str]) -> None:
        try:
            check_adapter(*args, "10.0.0.2")
        except AdapterError as error:
            raise RuntimeError(f"Worker failed with error '{AdapterError.__name__}: {error}', please check") from None

    async def _add_lora(self, lora_request: Any) -> bool:
        if self.broken:
            raise RuntimeError("one node lacks it")
        return True

    async def _add_request(self, request: str, lora_request: Any = None) -> str:
        return "added"

    add_lora = _record_load(_add_lora)
    add_request = _check_first(lambda: True, _add_request)


def create_adapter(folder: Path) -> None:
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()


def test_a_relative_path_is_that_of_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_found: type[Exception]
) -> None:
    """Without its folder it looks like a name on a hub, which a worker would ask in a step."""
    monkeypatch.chdir(tmp_path)

    async def load_then_lose() -> None:
        engine = Engine(max_cpu_loras=1)
        for number, name in enumerate(("first", "second"), 1):
            create_adapter(tmp_path / name)
            await engine.add_lora(lora_request(name, number, name))
        assert await engine.add_request("r", lora_request=lora_request("first", 1, "first")) == "added"
        shutil.rmtree(tmp_path / "first")
        with pytest.raises(not_found, match=f"node 10.0.0.2 has no adapter_config.json in {tmp_path}/first"):
            await engine.add_request("r", lora_request=lora_request("first", 1, "first"))
        create_adapter(tmp_path / "moved")  # under which a request may name it as well
        assert await engine.add_request("r", lora_request=lora_request("first", 1, "moved")) == "added"

    asyncio.run(load_then_lose())


def test_a_load_that_fails_may_have_taken_the_place_of_another_adapter(
    tmp_path: Path, not_found: type[Exception]
) -> None:
    async def load_both() -> None:
        engine, first = Engine(max_cpu_loras=1), lora_request("first", 1, str(tmp_path / "first"))
        await engine.add_lora(first)
        assert await engine.add_request("r", lora_request=first) == "added"  # no worker has to read it again
        engine.broken = True
        with pytest.raises(RuntimeError):
            await engine.add_lora(lora_request("second", 2, "/second"))
        with pytest.raises(not_found, match="VRA-387"):
            await engine.add_request("r", lora_request=first)

    asyncio.run(load_both())


def test_an_adapter_of_tensorizer_needs_no_folder(not_found: type[Exception]) -> None:
    """vLLM reads it from tensorizer_dir, which may be an address in an object store."""

    async def ask() -> None:
        adapter = lora_request("mine", 1, "/gone", {"tensorizer_dir": "s3://bucket/mine"})
        assert await Engine(max_cpu_loras=1).add_request("r", lora_request=adapter) == "added"

    asyncio.run(ask())


def test_an_adapter_that_was_loaded_in_place_is_read_again(tmp_path: Path, not_found: type[Exception]) -> None:
    """vLLM keeps the flag of /v1/load_lora_adapter in each request, where it makes workers read the adapter again."""

    async def load_then_ask() -> None:
        engine, adapter = Engine(max_cpu_loras=8), lora_request("mine", 1, str(tmp_path / "gone"))
        await engine.add_lora(adapter)
        assert await engine.add_request("r", lora_request=adapter) == "added"
        adapter.load_inplace = True
        with pytest.raises(not_found, match="VRA-387"):
            await engine.add_request("r", lora_request=adapter)

    asyncio.run(load_then_ask())
