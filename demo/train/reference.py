"""Reference tokens: greedy decoding of the demonstration models by Transformers on the CPU.

    python -m demo.train.reference [--check] [FOLDER ...]

writes FOLDER/reference.json (default: both checked-in models), or with --check compares the file with a live run. Tests
of processes that use NPUs read the file with `stored_reference`, since torch_npu must stay out of the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from demo.train.recitation import DENSE, MOE, PROBES, PROMPTS, QUESTION

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16")
ALL_TOKENS = 320
"""More new tokens than the whole text has, end token included."""
PROBE_TOKENS = 24


class Entry(TypedDict):
    """One prompt and what must come back."""

    kind: str  # "completion" or "chat", which are learnt, or "probe", which is not
    prompt: str
    dtype: str
    prompt_tokens: list[int]
    tokens: list[int]  # the end token, if reached, is the last
    text: str  # without special tokens
    logprobs: list[float]  # natural logarithm of the probability of each of `tokens`
    margin: float  # least distance between the best and the second logit among `tokens`


class Decoded(NamedTuple):
    """What greedy decoding gave; the fields are as in Entry."""

    tokens: list[int]
    logprobs: list[float]
    margin: float


def use_plain_torch() -> None:
    """Keep torch_npu out of this process: torch imports it as a device backend, Transformers wherever it is installed.

    torchvision, which Transformers would import too, stays out as well: its wheel does not load beside a CPU torch.
    Raises RuntimeError where it is loaded already.
    """
    if sys.modules.get("torch_npu") is not None:
        raise RuntimeError(
            "the reference must come from plain PyTorch, but this process has loaded torch_npu: start another one, "
            "`python -m demo.train.reference`, or read the stored tokens with stored_reference()"
        )
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for package in ("torch_npu", "torchvision"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # Python's own way to mark a package as not installed


def load(model_dir: Path, dtype: str) -> tuple[Any, Any]:
    """Load the tokenizer and the model in `model_dir`, on the CPU, with weights as `dtype` ("float32", "bfloat16").

    Raises RuntimeError as use_plain_torch() does.
    """
    use_plain_torch()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype), local_files_only=True)
    return tokenizer, model


def user(content: str) -> dict[str, str]:
    """Return a chat message of the role user."""
    return {"role": "user", "content": content}


def chat_prompt(tokenizer: Any, *messages: dict[str, str]) -> str:
    """Return `messages` in the chat template, up to the start of the answer."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def greedy(model: Any, prompt_tokens: list[int], max_new_tokens: int) -> Decoded:
    """Return new tokens up to an end token (included) or `max_new_tokens`."""
    import torch

    prompt = torch.tensor([prompt_tokens])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.cat(out.logits).float()
    return Decoded(
        tokens=out.sequences[0, len(prompt_tokens) :].tolist(),
        logprobs=[round(value, 5) for value in logits.log_softmax(-1).max(-1).values.tolist()],
        margin=round(float(top_margins(logits).min()), 4),
    )


def likeliest(model: Any, entry: Entry) -> list[int]:
    """Return, for each of the entry's tokens, the likeliest one after the prompt and the tokens before it."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([entry["prompt_tokens"] + entry["tokens"]])).logits[0]
    return logits[len(entry["prompt_tokens"]) - 1 : -1].argmax(-1).tolist()  # type: ignore[no-any-return]


def top_margins(logits: torch.Tensor) -> torch.Tensor:
    """Return the distance between the best and the second of the last dimension, as fp32."""
    best = logits.float().topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def stored_reference(model_dir: Path, dtype: str, kind: str | None = None) -> list[Entry]:
    """Return the entries of `model_dir`/reference.json with that dtype and, where given, that kind."""
    entries: list[Entry] = json.loads((model_dir / "reference.json").read_text())
    return [entry for entry in entries if entry["dtype"] == dtype and kind in (None, entry["kind"])]


def all_prompts(tokenizer: Any, dtype: str) -> list[tuple[str, str, list[int], int]]:
    """Return kind, prompt, its tokens and the limit of new tokens, for every entry of that dtype."""
    prompts = [("completion", prompt, prompt, ALL_TOKENS) for prompt in PROMPTS]
    prompts.append(("chat", QUESTION, chat_prompt(tokenizer, user(QUESTION)), ALL_TOKENS))
    if dtype == "float32":
        prompts += [("probe", prompt, prompt, PROBE_TOKENS) for prompt in PROBES]
    return [(kind, prompt, tokenizer(whole).input_ids, limit) for kind, prompt, whole, limit in prompts]


def make_reference(model_dir: Path) -> list[Entry]:
    """Return all entries for the model in `model_dir`, computed now."""
    entries: list[Entry] = []
    for dtype in DTYPES:
        tokenizer, model = load(model_dir, dtype)
        for kind, prompt, prompt_tokens, limit in all_prompts(tokenizer, dtype):
            decoded = greedy(model, prompt_tokens, limit)
            entries.append(
                Entry(
                    kind=kind,
                    prompt=prompt,
                    dtype=dtype,
                    prompt_tokens=prompt_tokens,
                    tokens=decoded.tokens,
                    text=tokenizer.decode(decoded.tokens, skip_special_tokens=True),
                    logprobs=decoded.logprobs,
                    margin=decoded.margin,
                )
            )
    return entries


def write_reference(model_dir: Path) -> None:
    """Compute and write `model_dir`/reference.json, one entry a line."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in make_reference(model_dir))
    (model_dir / "reference.json").write_text(f"[\n{lines}\n]\n")


def differences(model_dir: Path) -> list[str]:
    """Return the differences between the stored tokens and the model's present ones, one line each.

    The stored tokens are those of greedy decoding exactly if each is the likeliest after all before it, and the first
    end token stands last, or none within the limit. So one pass over each entry is enough: far faster than decoding.
    """
    found = []
    for dtype in DTYPES:
        tokenizer, model = load(model_dir, dtype)
        stored = stored_reference(model_dir, dtype)
        wanted = all_prompts(tokenizer, dtype)
        if [entry["prompt_tokens"] for entry in stored] != [prompt_tokens for _, _, prompt_tokens, _ in wanted]:
            found.append(f"{model_dir.name}: the stored {dtype} prompts are not today's")
            continue
        for entry, (*_, limit) in zip(stored, wanted, strict=True):
            live = likeliest(model, entry)
            ends = [i for i, token in enumerate(live, 1) if token in model.generation_config.eos_token_id]
            if live != entry["tokens"] or min([*ends, limit]) != len(live):
                found.append(
                    f"{model_dir.name}: {dtype} {entry['prompt']!r}: stored {entry['tokens']}, computed {live}"
                )
    return found


def main() -> int:
    """Write or check the reference; 0 when all is well, 1 where a stored token differs."""
    parser = argparse.ArgumentParser(description="Write or check the reference tokens of the demonstration models.")
    parser.add_argument("folders", nargs="*", type=Path, default=[DENSE, MOE], metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="compare with the stored file instead of writing it")
    args = parser.parse_args()
    if not args.check:
        for folder in args.folders:
            write_reference(folder)
        return 0
    found = [line for folder in args.folders for line in differences(folder)]
    for line in found:
        print(f"{line}; recompute with: python -m demo.train.reference", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
