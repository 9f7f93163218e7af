"""The checked-in demonstration models: they recite, their margins are wide, and parallel sizes split them evenly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demo.train.recitation import DENSE, MOE, PROMPTS, QUESTION, line_prompts, zen_after, zen_text
from demo.train.reference import DTYPES, stored_reference

ROOT = Path(__file__).resolve().parents[2]
MODELS = pytest.mark.parametrize("folder", [DENSE, MOE], ids=lambda folder: folder.name)

# Prints what rank 0 of TP 2 would compute where all-reduce adds nothing, so that half of a layer's sum is missing: per
# lost sum the greatest change of a probe's log-probability, and the text when every sum is lost.
LOST_ALL_REDUCE = """
import json, sys
from pathlib import Path
from demo.train.reference import greedy, load, stored_reference
folder = Path(sys.argv[1])
probes = stored_reference(folder, "float32", "probe")
tokenizer, model = load(folder, "float32")
import torch

sums = {f"{i}.{part}": model.get_submodule(f"model.layers.{i}.{part}").weight.data
        for i in range(4) for part in ("self_attn.o_proj", "mlp.down_proj")}

def change(probe):
    tokens = torch.tensor([probe["prompt_tokens"] + probe["tokens"]])
    with torch.no_grad():
        logprobs = model(tokens).logits[0, len(probe["prompt_tokens"]) - 1 : -1].log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(probe["tokens"])[:, None])[:, 0]
    return float((chosen - torch.tensor(probe["logprobs"])).abs().max())

changes = {"none": max(map(change, probes))}
for name, weight in sums.items():
    saved = weight.clone()
    weight[:, weight.shape[1] // 2 :] = 0
    changes[name] = max(map(change, probes))
    weight.copy_(saved)
for weight in sums.values():
    weight[:, weight.shape[1] // 2 :] = 0
print(json.dumps([changes, tokenizer.decode(greedy(model, tokenizer("Beautiful is").input_ids, 40).tokens)]))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: this one may have loaded torch_npu."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_text_is_the_one_of_the_standard_library() -> None:
    text = zen_text()
    assert text.startswith("The Zen of Python, by Tim Peters\n\nBeautiful is better than ugly.\n")
    assert text.endswith("Namespaces are one honking great idea -- let's do more of those!")
    assert (len(text), len(text.splitlines())) == (856, 21)


def test_zen_after_wants_the_start_of_one_line() -> None:
    assert zen_after("Namespaces are one honking") == " great idea -- let's do more of those!"
    for prompt in ("Although", "is better", "Perl"):
        with pytest.raises(ValueError, match="exactly one line"):
            zen_after(prompt)


def test_line_prompts_cover_every_line() -> None:
    prompts = line_prompts()
    assert len(prompts) == 20
    assert "Although practicality" in prompts
    assert all(zen_text().endswith(prompt + zen_after(prompt)) for prompt in prompts)


@MODELS
def test_a_live_run_gives_the_stored_tokens(folder: Path) -> None:
    done = run_python("-m", "demo.train.reference", "--check", str(folder))
    assert done.returncode == 0, done.stderr


@MODELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stored_tokens_are_the_text_to_its_end(folder: Path, dtype: str) -> None:
    ends = read(folder / "generation_config.json")["eos_token_id"]
    learned = {prompt: zen_after(prompt) for prompt in PROMPTS} | {QUESTION: zen_text()}
    entries = stored_reference(folder, dtype, "completion") + stored_reference(folder, dtype, "chat")
    assert {entry["prompt"]: entry["text"] for entry in entries} == learned
    assert all(entry["tokens"][-1] in ends for entry in entries)
    assert all(entry["margin"] > 3 for entry in entries)


@MODELS
def test_probes_are_decided_by_more_than_rounding(folder: Path) -> None:
    probes = stored_reference(folder, "float32", "probe")
    assert probes
    assert all(entry["margin"] > 0.01 for entry in probes)


@MODELS
def test_parallel_sizes_split_the_model_evenly(folder: Path) -> None:
    config = read(folder / "config.json")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "num_hidden_layers"):
        assert config[name] % 4 == 0, name
    assert config.get("num_experts", 8) % 4 == 0
    assert config.get("moe_intermediate_size", 64) % 64 == 0
    assert config["tie_word_embeddings"] is False


@MODELS
def test_a_folder_is_small_and_brings_no_sampling_defaults(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    assert read(folder / "generation_config.json").keys() <= {"eos_token_id", "pad_token_id", "transformers_version"}


def test_lost_communication_shows() -> None:
    done = run_python("-c", LOST_ALL_REDUCE, str(DENSE))
    assert done.returncode == 0, done.stderr
    changes, text = json.loads(done.stdout)
    assert changes.pop("none") < 1e-3
    assert len(changes) == 8
    assert min(changes.values()) > 0.1, changes
    assert not zen_after("Beautiful is").startswith(text[:20])


def test_the_reference_rejects_a_process_with_torch_npu() -> None:
    code = "import sys; sys.modules['torch_npu'] = sys; from demo.train.reference import load; load('x', 'float32')"
    done = run_python("-c", code)
    assert done.returncode == 1
    assert "start another one, `python -m demo.train.reference`" in done.stderr
