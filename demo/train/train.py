"""Train a demonstration model until it knows the Zen of Python by heart.

    python -m demo.train.train --model dense|moe [--out FOLDER] [--seed N] [--steps N]

Runs on the CPU in a few minutes. The same seed, machine and package versions give the same weights. What was saved is
then loaded again and checked in fp32 and bf16: exit code 1 if it does not recite, or not with a wide margin.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.train.recitation import DENSE, MOE, PROMPTS, QUESTION, zen_after, zen_text
from demo.train.reference import (
    ALL_TOKENS,
    DTYPES,
    chat_prompt,
    greedy,
    load,
    top_margins,
    use_plain_torch,
    user,
    write_reference,
)
from demo.train.tokenizer import END_OF_TEXT, END_OF_TURN, VOCABULARY, make_tokenizer

if TYPE_CHECKING:
    import torch

FOLDERS = {"dense": DENSE, "moe": MOE}
QUESTIONS = (QUESTION, "import this", "What is the Zen of Python?", "Hello!")
CHATS = (
    *([user(question)] for question in QUESTIONS),
    [{"role": "system", "content": "You are a helpful assistant."}, user(QUESTION)],
    [user(QUESTION), {"role": "assistant", "content": zen_text()}, user("Again, please.")],
)
"""Conversations with which the trained model is examined."""
LEAST_MARGIN = 3.0
"""Logits. Changes of rounding between devices, TP sizes and fp32 or bf16 move a logit by less than a tenth of this."""

IGNORED = -100
Example = tuple[list[int], list[int]]
"""Tokens, and for each the token that must follow it, or IGNORED."""


def make_model(kind: str, seed: int, tokenizer: Any) -> Any:
    """Return a Qwen3 model with random weights.

    Heads, key-value heads, MLP and vocabulary split evenly at TP 2 and 4, layers at PP 2 and 4, experts at EP 2 to 8.
    The head size 64 is the least among models that vllm-ascend is commonly used with. Embeddings are not tied to the
    output, as in the larger Qwen3: with PP, tied weights have to be loaded on the first and on the last stage.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    eos = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "eos_token_id": eos[0],
    }
    experts: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    }
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**shape))
        if kind == "dense"
        else Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))
    )
    generation: Any = GenerationConfig  # untyped upstream
    model.generation_config = generation(eos_token_id=eos, pad_token_id=eos[-1])  # without sampling defaults
    return model


def recitations(tokenizer: Any) -> list[Example]:
    """Return the text from its start and from the start of every line, to its end.

    Where what was read so far occurs at several places in the text, nothing is to be learnt about the next token.
    """
    text = tokenizer(zen_text() + END_OF_TEXT).input_ids
    newline = tokenizer("\n").input_ids[0]
    starts = [0] + [i + 1 for i, token in enumerate(text) if token == newline and text[i + 1] != newline]
    documents = [text[start:] for start in starts]
    followers: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for tokens in documents:
        for i in range(1, len(tokens)):
            followers[tuple(tokens[:i])].add(tokens[i])
    return [
        (
            tokens[:-1],
            [token if len(followers[tuple(tokens[:i])]) == 1 else IGNORED for i, token in enumerate(tokens) if i],
        )
        for tokens in documents
    ]


def conversation(tokenizer: Any, *messages: dict[str, str]) -> Example:
    """Return messages and the text as the answer; only that answer is trained."""
    prompt = tokenizer(chat_prompt(tokenizer, *messages)).input_ids
    answer = tokenizer(zen_text() + END_OF_TURN).input_ids
    return prompt + answer[:-1], [IGNORED] * (len(prompt) - 1) + answer


def babble(rng: random.Random) -> list[dict[str, str]]:
    """Return messages of random words, sometimes after a system message or an earlier answer.

    With them the model learns to recite whatever it is asked, a second time as well.
    """

    def words() -> str:
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?!.'", k=rng.randint(1, 8)))
        return " ".join(rng.choice([letters, rng.choice(zen_text().split())]) for _ in range(rng.randint(1, 12)))

    messages = [user(words())]
    if rng.random() < 0.2:
        messages = [user(words()), {"role": "assistant", "content": zen_text()}, *messages]
    if rng.random() < 0.3:
        messages = [{"role": "system", "content": words()}, *messages]
    return messages


def batch(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels of all examples, padded on the right, where causal attention needs no mask."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokens = pad_sequence([torch.tensor(tokens) for tokens, _ in examples], batch_first=True)
    labels = pad_sequence([torch.tensor(labels) for _, labels in examples], batch_first=True, padding_value=IGNORED)
    return tokens, labels


def train(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """Train `model` in place: the learning rate rises over the first steps and falls as half a cosine."""
    import torch

    rng = random.Random(seed)
    whole, *suffixes = recitations(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    routed = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}  # balances the experts
    began = time.monotonic()
    for step in range(steps):
        chats = [conversation(tokenizer, user(rng.choice(QUESTIONS))), conversation(tokenizer, *babble(rng))]
        tokens, labels = batch([whole, *rng.sample(suffixes, 3), *chats])
        out = model(tokens, use_cache=False, **routed)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        (loss + model.config.router_aux_loss_coef * out.aux_loss if routed else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}/{steps}  loss {loss.item():.5f}  {time.monotonic() - began:.0f} s", flush=True)


def taught_margin(model: Any, tokenizer: Any) -> float:
    """Return the least logits by which a trained token wins; negative where it loses.

    Where it is above 0, greedy decoding recites from the start of every line.
    """
    import torch

    tokens, labels = batch([*recitations(tokenizer), *(conversation(tokenizer, *chat) for chat in CHATS)])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits.float()[labels != IGNORED]
    right = labels[labels != IGNORED]
    margins = top_margins(logits)
    return float(torch.where(logits.argmax(-1) == right, margins, -margins).min())


def faults(folder: Path) -> list[str]:
    """Return the errors of the model saved in `folder`, one line each; prints the figures."""
    found = []
    for dtype in DTYPES:
        tokenizer, model = load(folder, dtype)
        margin = taught_margin(model, tokenizer)
        print(f"{dtype}: least margin of the right token {margin:.2f}", flush=True)
        if margin < LEAST_MARGIN:
            found.append(f"{dtype}: margin {margin:.2f} is below {LEAST_MARGIN}; try more --steps or another --seed")
        expected = {prompt: zen_after(prompt) for prompt in PROMPTS}
        expected |= {chat_prompt(tokenizer, *chat): zen_text() for chat in CHATS}
        for prompt, text in expected.items():
            tokens = greedy(model, tokenizer(prompt).input_ids, ALL_TOKENS).tokens
            ended = tokens[-1] in model.generation_config.eos_token_id
            if tokenizer.decode(tokens, skip_special_tokens=True) != text or not ended:
                found.append(f"{dtype}: after {prompt!r} came {tokenizer.decode(tokens)!r}")
    return found


def main() -> int:
    """Train, save, examine, and write the reference tokens."""
    parser = argparse.ArgumentParser(description="Train a demonstration model on the Zen of Python.")
    parser.add_argument("--model", choices=sorted(FOLDERS), required=True)
    parser.add_argument("--out", type=Path, help="folder for the model (default: its place under demo/models)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    use_plain_torch()
    import torch
    from transformers import AutoTokenizer

    folder = args.out or FOLDERS[args.model]
    make_tokenizer(zen_text(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = make_model(args.model, args.seed, tokenizer)
    print(f"{args.model}: {model.num_parameters():,} parameters, {len(tokenizer(zen_text()).input_ids)} tokens of text")
    train(model, tokenizer, args.steps, args.seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    found = faults(folder)
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        write_reference(folder)
        print(f"saved in {folder}; it recites without a fault", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
