"""Clients of a served model: streams of known text, of which some are aborted."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import httpx
import openai

from demo.train.recitation import PROMPTS, zen_after

_STREAM_LIMIT_S = 300.0
_ABORT_SHARE = 0.25
_MAX_TOKENS = 200


class Clients:
    """``count`` threads that send requests one after the other until `stop`."""

    def __init__(self, url: str, model: str, count: int, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.longest_gap_s = 0.0
        self._url, self._model = url, model
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}-{number}"),), daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[str]:
        """End after the requests in flight; return an error for each client that hangs."""
        self._stopped.set()
        deadline = time.monotonic() + _STREAM_LIMIT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [f"{thread.name} hangs" for thread in self._threads if thread.is_alive()]

    def _run(self, choose: random.Random) -> None:
        client = openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", timeout=_STREAM_LIMIT_S, max_retries=0)
        while not self._stopped.is_set():
            prompt = choose.choice(PROMPTS)
            abort_after = choose.randrange(1, 40) if choose.random() < _ABORT_SHARE else None
            try:
                outcome = self._stream(client, prompt, abort_after)
            except (openai.OpenAIError, httpx.HTTPError) as error:
                outcome = ["failed"]
                with self._lock:
                    self.errors.append(repr(error))
            with self._lock:
                self.counts.update(outcome)

    def _stream(self, client: openai.OpenAI, prompt: str, abort_after: int | None) -> list[str]:
        """Read one answer; return what to count."""
        text, last = "", time.monotonic()
        with client.completions.create(
            model=self._model, prompt=prompt, max_tokens=_MAX_TOKENS, temperature=0, stream=True
        ) as stream:
            for number, chunk in enumerate(stream):
                now = time.monotonic()
                with self._lock:
                    self.longest_gap_s = max(self.longest_gap_s, now - last)
                last = now
                text += chunk.choices[0].text
                if number == abort_after:
                    return ["aborted"]
        right = zen_after(prompt).startswith(text) and bool(text)
        if not right:
            with self._lock:
                self.errors.append(f"wrong text after {prompt!r}: {text!r}")
        return ["completed", "right"] if right else ["completed"]
