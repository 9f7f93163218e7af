"""Programs that load a server at a fixed rate, and what they write about each request."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from softnpu.cluster import manager
from softnpu.cluster.plan import Cluster

from benchmarks.options import BenchError
from benchmarks.served.options import AIPERF, VLLM, Options
from benchmarks.served.servers import MODEL
from demo.server import QUIET

_PROMPT_TOKENS = 64
_LIMIT_S = 600.0


class Load(NamedTuple):
    """Requests a second, and the seed of the prompts."""

    rate: float
    seed: int


def measure_load(client: str, options: Options, cluster: Cluster, url: str, load: Load) -> dict[str, list[float]]:
    """Return, of each request, the seconds to the first token ("first token") and per further one ("time per token").

    Raises BenchError where the client or a request fails.
    """
    with tempfile.TemporaryDirectory(prefix="served-") as folder:
        run, read = {VLLM: (_run_vllm, read_vllm), AIPERF: (_run_aiperf, read_aiperf)}[client]
        found = read(run(options, cluster, url, load, Path(folder)))
    if len(found["first token"]) != options.requests:
        raise BenchError(f"{client}: {len(found['first token'])} of {options.requests} requests of {url} succeeded.")
    return found


def read_vllm(path: Path) -> dict[str, list[float]]:
    """Read what `vllm bench serve --save-detailed` wrote."""
    result: Mapping[str, Any] = json.loads(path.read_text())
    columns = (result[name] for name in ("ttfts", "itls", "output_lens", "errors"))
    requests = [request for request in zip(*columns, strict=True) if not request[-1]]
    return {
        "first token": [first for first, *_ in requests],
        "time per token": [sum(between) / (tokens - 1) for _, between, tokens, _ in requests],
    }


def read_aiperf(path: Path) -> dict[str, list[float]]:
    """Read what `aiperf profile` wrote about each request: one line of JSON, times in milliseconds."""
    records = [json.loads(line)["metrics"] for line in path.read_text().splitlines()]
    return {
        name: [record[key]["value"] / 1e3 for record in records if key in record]
        for name, key in (("first token", "time_to_first_token"), ("time per token", "inter_token_latency"))
    }


def _run_vllm(options: Options, cluster: Cluster, url: str, load: Load, folder: Path) -> Path:
    """Run vLLM's client in the server's environment, on its node."""
    command = [
        *("vllm", "bench", "serve", "--backend", "openai", "--base-url", url, "--model", MODEL),
        *("--served-model-name", Path(MODEL).name, "--dataset-name", "random", "--ignore-eos", "--disable-tqdm"),
        *("--random-input-len", str(_PROMPT_TOKENS), "--random-output-len", str(options.tokens)),
        *("--num-prompts", str(options.requests), "--request-rate", str(load.rate), "--seed", str(load.seed)),
        *("--temperature", "0", "--save-result", "--save-detailed"),
        *("--result-dir", str(folder), "--result-filename", "result.json"),
    ]
    _run(manager.node_command(cluster, 1, command), manager.command_environment(cluster, 1, QUIET))
    return folder / "result.json"


def _run_aiperf(options: Options, _: Cluster, url: str, load: Load, folder: Path) -> Path:
    """Run the program, which is of another environment."""
    command = [
        *(options.aiperf, "profile", "--url", url, "--model", Path(MODEL).name, "--tokenizer", MODEL),
        *("--endpoint-type", "completions", "--streaming", "--extra-inputs", "ignore_eos:true"),
        *("--request-rate", str(load.rate), "--request-count", str(options.requests)),
        *("--synthetic-input-tokens-mean", str(_PROMPT_TOKENS), "--output-tokens-mean", str(options.tokens)),
        *("--random-seed", str(load.seed), "--ui", "none", "--artifact-dir", str(folder)),
    ]
    _run(command, {"DO_NOT_TRACK": "1"})  # with Hugging Face's variables for offline use it takes no folder
    return folder / "profile_export.jsonl"


def _run(command: list[str], variables: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(command)} had not ended after {_LIMIT_S:g} s.") from None
    if done.returncode:
        raise BenchError(f"exit code {done.returncode} of {' '.join(command)}:\n{(done.stdout + done.stderr)[-2000:]}")
