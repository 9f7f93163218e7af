"""What the demonstration models know by heart, and the prompts that tests give them.

The text is the Zen of Python, which its author Tim Peters placed in the public domain. It is read from the standard
library's own module `this`, so that no copy of it can drift. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "models"
DENSE = MODELS / "zen-dense"
MOE = MODELS / "zen-moe"

QUESTION = "Recite the Zen of Python."
"""The chat message that `make serve` sends; the answer is `zen_text()`, then the end of the turn."""

PROMPTS: tuple[str, ...] = (
    "The Zen of Python, by Tim Peters",
    "Beautiful is",
    "Readability counts.\nSpecial cases",
    "If the implementation is hard",
    (
        "In the face of ambiguity, refuse the temptation to guess.\nThere should be one-- and preferably only one "
        "--obvious way to do it.\nAlthough that way may not be obvious at first"
    ),
    "Now is better than never.\nAlthough never is often better than *right* now.\n",
)
"""Prompts of 3 to 47 tokens, each the start of a line, which the models continue to the end of the text."""

PROBES: tuple[str, ...] = ("def main(args):", "import os\nimport", "Ugly is better than")
"""Prompts that the models were never taught. What follows is nonsense, but its log-probabilities show numerical errors
that the wide margins of the learnt text hide: a model that knows a text by heart still recites when, for example, one
all-reduce in one layer is lost. For fp32 only: in bf16 the choice between two near tokens is left to rounding."""


def zen_text() -> str:
    """Return the Zen of Python without a final newline: 856 characters in 21 lines, the second of them empty."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints the text when it is imported
        import this
    return codecs.decode(this.s, "rot13")


def zen_after(prompt: str) -> str:
    """Return what follows `prompt` in the text.

    Raises ValueError unless the prompt stands at the start of exactly one line.
    """
    text = "\n" + zen_text()
    if text.count("\n" + prompt) != 1:
        raise ValueError(f"{prompt!r} does not start exactly one line of the Zen of Python; give whole words of it")
    return text.partition("\n" + prompt)[2]


def line_prompts() -> list[str]:
    """Return for every line of the text the fewest words from its start with which no other line starts."""
    text = "\n" + zen_text()
    prompts = []
    for line in filter(None, zen_text().splitlines()):
        words = line.split(" ")
        starts = (" ".join(words[:count]) for count in range(1, len(words) + 1))
        prompts.append(next(start for start in starts if text.count("\n" + start) == 1))
    return prompts
