"""pytest plugin for vllm-ascend's tests: the demonstration's models where a test knows what another model answers.

Nothing of the tests themselves is changed: prompts, answers and models are data of their modules.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from demo.train.recitation import MOE
from demo.train.reference import stored_reference

ANSWERS = ("GOLDEN", "DP_GOLDEN")
"""What modules call the answers to their ``prompts``: pairs of tokens and text, each with the prompt."""
NEW_TOKENS = 16
_TRANSFER = "tests.e2e.pull_request.rlhf.weight_transfer_test_utils"


def pytest_configure() -> None:
    """Offer our model to the tests of weight transfer, before the modules are imported that read the list: with one
    worker of vLLM's multiprocessing as in their own cases, and with Ray."""
    utils: Any = importlib.import_module(_TRANSFER)
    utils.MODEL_CASES += tuple(
        utils.WeightUpdateModelCase(
            id=f"demo-{backend}",
            model="Qwen/Qwen3-0.6B",
            hf_overrides={},
            # Of an option that is given twice, the last one holds.
            extra_server_args=("--distributed-executor-backend", backend, "--kv-cache-memory-bytes", str(64 << 20)),
        )
        for backend in ("mp", "ray")
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the prompts that our model knows in the place of others, and what Transformers answers on the CPU."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        for name in ANSWERS:
            if answers := getattr(module, name, None):
                module.prompts, known = _known(len(answers))
                setattr(module, name, known)


def _known(count: int) -> tuple[list[str], list[tuple[list[int], str]]]:
    """Return so many prompts, and for each the tokens and the text that end NEW_TOKENS after it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MOE)
    entries = [entry for entry in stored_reference(MOE, "bfloat16") if entry["kind"] == "completion"][:count]
    answers = [(entry, entry["tokens"][:NEW_TOKENS]) for entry in entries]
    return [entry["prompt"] for entry in entries], [
        (entry["prompt_tokens"] + tokens, entry["prompt"] + tokenizer.decode(tokens, skip_special_tokens=True))
        for entry, tokens in answers
    ]
