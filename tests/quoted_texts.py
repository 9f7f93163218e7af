"""Texts that documents quote, and whether sources contain them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

LEAST = 9
"""Shorter pieces of a text are in any file."""

_VARIES = re.compile(
    r"\n|\.\.\.|\[[^\]]*\)?\]?|\b\d[\d.,]*(?:rc\d+)?\b|'[^']*'"  # dots, ranges, numbers, versions, quotes
    r"|\b(?:ASCEND|RAY|VLLM|HCCL)_[A-Z0-9_]+(?:=\S*)?|\b\w+Error:|VRA-\d{3}|%[a-z]"  # variables, names of errors, codes
    r"|\bvllm-(?:ray-)?ascend (?=\d)|vLLM's platform"
    r"|\b(?:NPUs?|GPUs?|bundles?|ranks?|model|hccl\w*|sample_tokens|execute_model(?:_and_sample_tokens)?|ray_ascend|platform)\b"
)


def pieces_of(text: str) -> list[str]:
    """Return the parts of a quoted text that do not vary from case to case."""
    return [kept for part in _VARIES.split(text) if len(kept := part.strip(" ,:;=()").lstrip(". ")) >= LEAST]


@cache
def strings_of(path: Path) -> str:
    """Return all string constants of a Python file, the pieces of each joined as Python joins them."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    return "\n".join(
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def is_said_in(paths: Iterable[Path], pieces: list[str]) -> bool:
    """Return whether one of the Python files contains all the ``pieces``."""
    words = max(pieces, key=len).encode().split()
    for path in paths:
        raw = path.read_bytes()
        # A long text is written in several pieces: its words are all there, if not side by side.
        if all(word in raw for word in words) and all(piece in strings_of(path) for piece in pieces):
            return True
    return False
