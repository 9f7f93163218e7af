"""Checks of generated text: sampling, scheduling, caching, batches in flight."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from demo.train.recitation import PROMPTS, line_prompts, zen_after, zen_text
from tests.e2e.parity.engine import CHUNK, Engine, check_equal, check_true


async def tokens(engine: Engine) -> None:
    """Greedy tokens and log-probabilities of all prompts in one batch, and of each alone, are those of Transformers."""
    await asyncio.gather(*(engine.check_entry(entry) for entry in engine.entries))
    await engine.check_entries(engine.probes())


async def logprobs(engine: Engine) -> None:
    """Top log-probabilities are ordered, are probabilities, and those of the prompt's own tokens are there too."""
    entry = engine.probes()[0]
    answer = await engine.ask(entry["prompt_tokens"], max_tokens=4, logprobs=5, prompt_logprobs=2)
    for token, found in zip(answer.outputs[0].token_ids, answer.outputs[0].logprobs, strict=True):
        ranked = sorted(found.values(), key=lambda each: each.rank)
        check_equal([each.rank for each in ranked], [1, 2, 3, 4, 5], "ranks of the top 5")
        check_equal(found[token].rank, 1, "rank of the greedy token")
        values = [each.logprob for each in ranked]
        check_equal(values, sorted(values, reverse=True), "order of the top 5")
        check_true(sum(map(math.exp, values)) <= 1 + 1e-5, f"probabilities of more than 1: {values}")
    check_equal(len(answer.prompt_logprobs), len(entry["prompt_tokens"]), "log-probabilities of the prompt")
    check_true(all(each for each in answer.prompt_logprobs[1:]), "log-probabilities of the prompt are empty")


TOKENS = 64
"""Of each of many requests."""


async def batches_in_flight(engine: Engine) -> None:
    """Simultaneous requests, each with its own right text; a stage begins a batch while the next stage has another."""
    await engine.workers("take_batches")
    # Long ones fill a batch each while they are prefilled; short ones alone would all be in the same batch forever.
    lines = zen_text().splitlines(keepends=True)
    prompts = [*line_prompts()[:4], *("".join(lines[:number]) for number in range(8, 18))]
    answers = await asyncio.gather(*(engine.ask(prompt, max_tokens=TOKENS) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        given = answer.outputs[0]
        check_equal(given.text, zen_after(prompt)[: len(given.text)], f"text after {prompt!r}")
        check_true(
            len(given.token_ids) == TOKENS or given.finish_reason == "stop", f"only {given.text!r} after {prompt!r}"
        )
    batches = await engine.workers("take_batches")
    first, last = batches[0], batches[-1]
    check_equal([batch["tokens"] for batch in first], [batch["tokens"] for batch in last], "batches of the last stage")
    if engine.options["pp"] == 1:
        return
    pairs = list(zip(first[1:], last, strict=False))
    overlapping = [(later, earlier) for later, earlier in pairs if later["begin"] < earlier["end"]]
    check_true(overlapping, f"none of {len(first)} batches began on the first stage before the one before it ended")
    disjoint = [pair for pair in overlapping if not pair[0]["tokens"].keys() & pair[1]["tokens"].keys()]
    check_true(disjoint, f"all {len(overlapping)} pairs of batches in flight were of the same requests")
    engine.remarks["batches_in_flight"] = f"{len(overlapping)} of {len(first)} batches overlapped the one before"


async def async_scheduling(engine: Engine) -> None:
    """Check that the engine schedules as configured, by default before the last step's tokens are known."""
    wanted = engine.options.get("arguments", {}).get("async_scheduling", True)
    described = await engine.workers("describe", [])
    check_equal({each["async_scheduling"] for each in described}, {wanted}, "async scheduling of the workers")
    await engine.workers("take_batches")
    await engine.check_text()
    outputs = {batch["output"] for batch in (await engine.workers("take_batches"))[-1]}
    check_equal(outputs, {"AsyncGPUModelRunnerOutput" if wanted else "ModelRunnerOutput"}, "outputs of the last stage")


async def prefix_caching(engine: Engine) -> None:
    """Check that the second request with a long prompt computes only its end; the text stays right."""
    prompt = zen_text()[:780]
    await engine.llm.reset_prefix_cache()
    cached = []
    for _ in range(2):
        answer = await engine.ask(prompt)
        check_equal(answer.outputs[0].text, zen_after(prompt), "text after the long prompt")
        cached.append(answer.num_cached_tokens)
    check_equal(cached[0], 0, "tokens in the cache after it was emptied")
    check_true(cached[1] >= 128, f"{cached[1]} tokens of {len(answer.prompt_token_ids)} came from the cache")
    await engine.llm.reset_prefix_cache()
    check_equal((await engine.ask(prompt)).num_cached_tokens, 0, "tokens in the cache after it was emptied again")


async def chunked_prefill(engine: Engine) -> None:
    """Check that a prompt longer than a batch is computed in several, while another request continues to generate."""
    prompt = zen_text()[:700]
    await engine.llm.reset_prefix_cache()
    await engine.workers("take_batches")
    short = asyncio.create_task(engine.ask(PROMPTS[0], name="short"))
    answer = await engine.ask(prompt, name="long")
    check_equal(answer.outputs[0].text, zen_after(prompt), "text after the long prompt")
    check_equal((await short).outputs[0].text, zen_after(PROMPTS[0]), "text of the other request")
    for batches in await engine.workers("take_batches"):
        given = [batch["tokens"] for batch in batches]
        check_true(all(sum(each.values()) <= CHUNK for each in given), f"more than {CHUNK} tokens in a batch: {given}")
        chunks = [count for each in given for name, count in each.items() if name.startswith("long") and count > 1]
        check_equal(sum(chunks), len(answer.prompt_token_ids), f"tokens of the chunks {chunks}")
        check_true(len(chunks) > 1, f"chunks of {chunks} tokens")
        mixed = [each for each in given if len(each) > 1 and max(each.values()) > 1]
        check_true(mixed, "no batch had a chunk of the long prompt and a token of the short one")


async def structured_output(engine: Engine) -> None:
    """Check that a grammar restricts the text, and changes nothing where it allows the text, in one batch."""
    from vllm.sampling_params import StructuredOutputsParams

    prompt = PROMPTS[1]
    right, _, _ = zen_after(prompt).partition("\n")
    forbidding = {
        "regex": StructuredOutputsParams(regex="[0-9]{4}"),
        "choice": StructuredOutputsParams(choice=["Guido", "Barry"]),
        "json": StructuredOutputsParams(json={"type": "object", "properties": {"ok": {"type": "boolean"}},
                                              "required": ["ok"], "additionalProperties": False}),
    }  # fmt: skip
    allowing = StructuredOutputsParams(choice=["Guido", right])
    names = [*forbidding, "allowed", "free"]
    answers = await asyncio.gather(
        *(engine.ask(prompt, structured_outputs=each, max_tokens=60) for each in forbidding.values()),
        engine.ask(prompt, structured_outputs=allowing),
        engine.ask(prompt),
    )
    found = {name: answer.outputs[0].text for name, answer in zip(names, answers, strict=True)}
    check_true(len(found["regex"]) == 4 and found["regex"].isdigit(), f"[0-9]{{4}} gave {found['regex']!r}")
    check_true(found["choice"] in ("Guido", "Barry"), f"the choice gave {found['choice']!r}")
    check_true(found["json"] in ('{"ok":true}', '{"ok":false}', '{"ok": true}', '{"ok": false}'), f"json gave {found}")
    check_equal(found["allowed"], right, "text that the grammar allows")
    check_equal(found["free"], zen_after(prompt), "text of the request without a grammar")


async def seeded_samples(engine: Engine) -> None:
    """n=2 with a seed: two different answers, and the same two again, whatever else is in the batch."""
    probe = engine.probes()[0]["prompt_tokens"]
    given: dict[str, Any] = {"n": 2, "seed": 7, "temperature": 2.0, "max_tokens": 24, "ignore_eos": True}
    alone = await engine.ask(probe, **given)
    crowded, _, _ = await asyncio.gather(engine.ask(probe, **given), engine.check_text(), engine.ask(PROMPTS[0]))
    drawn = [sorted((each.index, tuple(each.token_ids)) for each in answer.outputs) for answer in (alone, crowded)]
    check_equal(drawn[1], drawn[0], "samples of the second run")
    check_true(drawn[0][0][1] != drawn[0][1][1], "both samples are the same")
    other = await engine.ask(probe, **{**given, "seed": 8})
    check_true(
        {tuple(each.token_ids) for each in other.outputs} != {each for _, each in drawn[0]}, "the seed does nothing"
    )


async def stop_strings(engine: Engine) -> None:
    """Check that generation ends before the stop string, or after it where it is to be included."""
    before, _, _ = zen_after(PROMPTS[1]).partition("Simple")
    for include in (False, True):
        answer = (await engine.ask(PROMPTS[1], stop=["Simple"], include_stop_str_in_output=include)).outputs[0]
        check_equal(answer.text, before + ("Simple" if include else ""), "text up to the stop string")
        check_equal((answer.finish_reason, answer.stop_reason), ("stop", "Simple"), "finish reason")


async def abort(engine: Engine) -> None:
    """Check that after a client disconnects nothing more is computed for it, and the engine continues to serve."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
    other = asyncio.create_task(engine.ask(PROMPTS[0]))

    async def leave_early() -> None:
        async for output in engine.llm.generate(PROMPTS[1], parameters, "leaving"):
            if len(output.outputs[0].token_ids) >= 3:
                raise asyncio.CancelledError  # as the API server does when the connection is closed

    await asyncio.gather(leave_early(), return_exceptions=True)
    check_equal((await other).outputs[0].text, zen_after(PROMPTS[0]), "text of the other request")
    await engine.check_text()
    await engine.workers("take_batches")
    await engine.check_text()
    for batches in await engine.workers("take_batches"):
        left = [name for batch in batches for name in batch["tokens"] if name.startswith("leaving")]
        check_true(not left, f"{left} was computed on")
    check_true(not engine.llm.output_processor.has_unfinished_requests(), "requests are left")
    await engine.llm.check_health()


CHECKS = (
    tokens, logprobs, batches_in_flight, async_scheduling, prefix_caching, chunked_prefill, structured_output,
    seeded_samples, stop_strings, abort,
)  # fmt: skip
