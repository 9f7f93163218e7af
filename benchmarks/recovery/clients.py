"""Requests to one data parallel rank, with the times at which they were answered."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import openai

from demo.train.recitation import PROMPTS, zen_after

_LIMIT_S = 300.0
_PAUSE_S = 0.1
_VOCABULARY = 500
_TEXT = zen_after(PROMPTS[0])
_SHORT, _LONG = 8, 400


class Answer(NamedTuple):
    """When a request was sent and answered, on the clock of time.monotonic(), and how it failed, if it did."""

    sent: float
    answered: float
    error: str


def short(_: random.Random) -> Mapping[str, Any]:
    """Return a request of a few tokens."""
    return {"prompt": PROMPTS[0], "max_tokens": _SHORT}


def prefill(choose: random.Random) -> Mapping[str, Any]:
    """Return a request with a long prompt that no cache has, and an answer of one token."""
    return {"prompt": [choose.randrange(3, _VOCABULARY) for _ in range(_LONG)], "max_tokens": 1}


def decode(_: random.Random) -> Mapping[str, Any]:
    """Return a request with a short prompt and a long answer."""
    return {"prompt": PROMPTS[0], "max_tokens": _LONG}


REQUESTS = {"short": short, "prefill": prefill, "decode": decode}


class Client:
    """Threads each of which sends requests of a kind to a data parallel rank, one after the other, in a context."""

    def __init__(self, url: str, model: str, rank: int, kind: str, threads: int) -> None:
        """``kind`` is one of `REQUESTS`."""
        self.answers: list[Answer] = []
        """In the order in which they were answered."""
        self._model, self._make = model, REQUESTS[kind]
        self._openai = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            timeout=_LIMIT_S,
            max_retries=0,
            default_headers={"X-data-parallel-rank": str(rank)},
        )
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(number),), daemon=True) for number in range(threads)
        ]

    def __enter__(self) -> Client:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(_LIMIT_S)

    def ask(self, choose: random.Random) -> Answer:
        """Send a request and wait for the answer, which has to be the right text where the text is known."""
        request, sent = self._make(choose), time.monotonic()
        try:
            answer = self._openai.completions.create(model=self._model, temperature=0, **request)
        except openai.OpenAIError as error:
            return Answer(sent, time.monotonic(), f"{type(error).__name__}: {error}")
        text = answer.choices[0].text
        is_right = request["prompt"] != PROMPTS[0] or (bool(text) and _TEXT.startswith(text))
        return Answer(sent, time.monotonic(), "" if is_right else f"wrong text: {text!r}")

    def _run(self, choose: random.Random) -> None:
        while not self._stopped.is_set():
            answer = self.ask(choose)
            self.answers.append(answer)
            if answer.error:
                self._stopped.wait(_PAUSE_S)


def wait_for_answer(url: str, model: str, rank: int) -> float:
    """Return when a data parallel rank gave the right answer, on the clock of time.monotonic().

    Raises TimeoutError where it gives none within the limit.
    """
    client = Client(url, model, rank, "short", 0)
    deadline = time.monotonic() + _LIMIT_S
    while (answer := client.ask(random.Random())).error:
        if time.monotonic() > deadline:
            raise TimeoutError(f"data parallel rank {rank} does not answer: {answer.error}")
        time.sleep(_PAUSE_S)
    return answer.answered
