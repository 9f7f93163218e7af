"""Checks of operations on an engine: calls of workers, weights, adapters, sleep, variables, metrics."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demo.train.recitation import PROMPTS, zen_after
from tests.e2e.parity.engine import Engine, check_equal, check_true
from tests.e2e.parity.reference import ADAPTERS, FACTORS, SCALED

_METRIC = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_METRICS_TRIES = 60


async def collective_rpc(engine: Engine) -> None:
    """Methods of the worker extension class run on every rank, in order; an error reaches only its caller."""
    size = engine.options["tp"] * engine.options["pp"]
    check_equal([each["rank"] for each in await engine.workers("describe", [])], list(range(size)), "ranks")
    described = await engine.workers("describe", names=[], places=False)
    check_equal([each["rank"] for each in described], [None] * size, "results with keyword arguments")
    facts = await engine.workers("facts")
    for fact in facts:
        check_true("vllm_ascend.worker.worker.NPUWorker" in fact["classes"], f"classes {fact['classes']}")
        check_true(any(name.endswith("ParityWorker") for name in fact["classes"]), f"classes {fact['classes']}")
    try:
        await engine.workers("fail_on", 0, "on purpose")
    except Exception as error:  # noqa: BLE001 - the check looks at whatever it is
        check_true("on purpose" in str(error), f"the error is {error}")
    else:
        check_true(False, "the error of a worker was lost")
    check_equal(await engine.workers("fail_on", size, "nobody"), [size] * size, "results after an error")
    await engine.check_text()


async def weight_update(engine: Engine) -> None:
    """Weights changed in place give Transformers' tokens with the same weights; changed back, the old tokens."""
    changed, before = engine.changed[SCALED], engine.probes()
    check_true([e["tokens"] for e in changed] != [e["tokens"] for e in before], "the change of weights changes nothing")
    loaded = await engine.workers("load_scaled", FACTORS)
    check_equal(sum(loaded), len(FACTORS) * engine.options["tp"], "weights loaded")
    await engine.llm.reset_prefix_cache()
    await engine.check_entries(changed)
    await engine.workers("load_scaled", dict.fromkeys(FACTORS, 1.0))
    await engine.llm.reset_prefix_cache()
    await engine.check_entries(before)
    await engine.check_text()


async def _memory_in_use(engine: Engine) -> list[int]:
    return [each["used"] for each in await engine.workers("describe", [])]


async def sleep_1(engine: Engine) -> None:
    """Asleep the NPUs' memory is free; awake the weights are back and the text is right."""
    await engine.check_text()
    awake = await _memory_in_use(engine)
    await engine.llm.sleep(level=1)
    check_true(await engine.llm.is_sleeping(), "the engine does not report that it sleeps")
    asleep = await _memory_in_use(engine)
    check_true(all(a - b >= 64 << 20 for a, b in zip(awake, asleep, strict=True)), f"memory {awake}, asleep {asleep}")
    await engine.llm.wake_up()
    check_true(not await engine.llm.is_sleeping(), "the engine still reports that it sleeps")
    await engine.check_entries(engine.probes())
    await engine.check_text()
    engine.remarks["sleep_1"] = f"bytes in use on each NPU {awake}, asleep {asleep}"


async def sleep_2(engine: Engine) -> None:
    """Weights and cache are dropped; after waking in two steps, the weights loaded in between, the text is right."""
    await engine.llm.sleep(level=2)
    await engine.llm.wake_up(tags=["weights"])
    await engine.workers("load_scaled", {}, everything=True)
    await engine.llm.wake_up(tags=["kv_cache"])
    check_true(not await engine.llm.is_sleeping(), "the engine still reports that it sleeps")
    await engine.check_entries(engine.probes())
    await engine.check_text()


async def runtime_env(engine: Engine) -> None:
    """Workers have the variables of the user's runtime_env, which win over the driver's, and over ours."""
    wanted: dict[str, str] = engine.options["runtime_env"]
    for described in await engine.workers("describe", list(wanted)):
        wrong = sorted(name for name, value in wanted.items() if described["environment"][name] != value)
        check_equal(wrong, [], f"variables of rank {described['rank']} that are not those of the runtime_env")
    secret = engine.options["secret"]
    described = await engine.workers("describe", [secret])
    check_true(
        all(each["environment"][secret] == os.environ[secret] for each in described), "the driver's variable is lost"
    )


async def metrics(engine: Engine) -> None:
    """vLLM's metrics reach Ray under names that Prometheus accepts; where Ray's exporter runs, they arrive there."""
    from ray.util.metrics import Metric

    names = {
        each.info["name"]: each.info["tag_keys"] for each in gc.get_objects() if type(each) in _metric_classes(Metric)
    }
    ours = {name for name in names if "vllm" in name}
    check_true(len(ours) > 30, f"only {len(ours)} metrics of vLLM are in Ray: {sorted(ours)}")
    _check_names(names, {label for labels in names.values() for label in labels})
    engine.remarks["metrics"] = f"{len(ours)} names, as {min(ours)}"
    if not all(importlib.util.find_spec(package) for package in _EXPORTER):
        return
    samples = await _fetch_exported_metrics()
    _check_names({each.name for each in samples}, {label for each in samples for label in each.labels})
    counted = [each.value for each in samples if re.search(r"vllm.*generation_tokens(_total)?$", each.name)]
    check_true(counted and sum(counted) > 0, f"no tokens counted: {sorted({each.name for each in samples})}")
    found = {each.name for each in samples if "vllm" in each.name}
    engine.remarks["metrics"] += f"; {len(found)} exported, as {min(found)}: {sum(counted):.0f} tokens"


_EXPORTER = ("opencensus", "opentelemetry.exporter.prometheus")
"""What `pip install ray[default]` brings for it."""


def _metric_classes(metric: Any) -> set[type]:
    return {metric, *metric.__subclasses__()}


def _check_names(names: Iterable[str], labels: Iterable[str]) -> None:
    bad = [name for name in names if not _METRIC.fullmatch(name)]
    check_equal(bad + [label for label in labels if not _LABEL.fullmatch(label)], [], "names that Prometheus rejects")


async def _fetch_exported_metrics() -> list[Any]:
    """Return vLLM's samples from the exporter of this node, as Prometheus' own parser reads them."""
    import ray
    from prometheus_client.parser import text_string_to_metric_families as parse

    address = ray.util.get_node_ip_address()
    port = next(node["MetricsExportPort"] for node in ray.nodes() if node["NodeManagerAddress"] == address)
    for _ in range(_METRICS_TRIES):
        text = await asyncio.to_thread(_fetch_text, f"http://{address}:{port}/metrics")
        if "vllm" in text:
            break
        await asyncio.sleep(1)
    return [sample for family in parse(text) for sample in family.samples]


def _fetch_text(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())
    except OSError as error:
        return f"# {error}\n"


async def lora(engine: Engine) -> None:
    """Adapters give Transformers' tokens with them merged, each in one batch with the others and with none."""
    from vllm.lora.request import LoRARequest

    requests: dict[str, Any] = {
        name: LoRARequest(name, number, str(Path(engine.options["folder"]) / name))
        for number, name in enumerate(ADAPTERS, 1)
    }
    for name, request in requests.items():
        tokens = [entry["tokens"] for entry in engine.changed[name]]
        check_true(tokens != [entry["tokens"] for entry in engine.probes()], f"adapter {name} changes nothing")
        await engine.check_entries(engine.changed[name], request)
    await asyncio.gather(
        *(engine.check_entry(entry, request) for name, request in requests.items() for entry in engine.changed[name]),
        *(engine.check_entry(entry) for entry in engine.probes()),
        *(engine.check_text(prompt) for prompt in PROMPTS[:2]),
    )
    check_equal(set(await engine.llm.list_loras()), {1, 2}, "adapters that are loaded")
    check_true(await engine.llm.remove_lora(1), "the adapter could not be removed")
    await engine.check_entries(engine.probes())


async def speculation(engine: Engine) -> None:
    """Tokens that an n-gram proposes are accepted where they are right; the text is the same."""
    await engine.workers("take_batches")
    twice = f"{PROMPTS[0]}{zen_after(PROMPTS[0])}\n\n{PROMPTS[0]}"
    answer = await engine.ask(twice, max_tokens=60, logprobs=0)
    plain = [entry for entry in engine.entries if entry["kind"] != "chat"]
    notes = (await engine.workers("take_batches"))[0]
    steps = [sum(note["tokens"].values()) for note in notes]
    check_true(max(steps[-3:], default=0) > 1 or len(steps) < 60, f"no step had a proposed token: {steps}")
    check_true(len(answer.outputs[0].token_ids) == 60, f"{len(answer.outputs[0].token_ids)} tokens")
    await asyncio.gather(*(engine.check_entry(entry) for entry in plain))
    engine.remarks["speculation"] = f"60 tokens in {len(steps)} steps, prompt included"


CHECKS = (collective_rpc, weight_update, sleep_1, sleep_2, runtime_env, metrics, lora, speculation)
