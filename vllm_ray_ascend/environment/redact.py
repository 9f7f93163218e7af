"""Variables as they may be logged or printed: secrets hidden."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vllm_ray_ascend.environment.table import SECRET, is_secret

HIDDEN = "***"

# A secret's name inside a value, its mark (an option has a space), and what is given to it.
_ASSIGNMENT = re.compile(
    rf"""([\w.-]*(?:{SECRET})[\w.-]*["']?\s*[=:\s]\s*)("[^"]*"|'[^']*'|(?:(?:Bearer|Basic)\s+)?[^\s&"']+)""",
    re.IGNORECASE,
)


def shown(name: str, value: str) -> str:
    """``value``, or what may be seen of it: nothing of a secret's, of others all but passwords inside.

    Hidden inside a value are a URL's user and password (``http_proxy=http://me:pw@proxy:3128``), and what is given to
    a secret's name (``--api-key abc``, ``?token=abc``, ``{"password": "abc"}``).
    """
    if is_secret(name):
        return HIDDEN if value else ""
    return _ASSIGNMENT.sub(rf"\1{HIDDEN}", _without_user(value))


def redacted(variables: Mapping[str, str]) -> dict[str, str]:
    """``variables``, each as `shown`."""
    return {name: shown(name, value) for name, value in variables.items()}


def _without_user(value: str) -> str:
    # Up to the last "@": a password may contain any other sign, and rather too much is hidden than too little.
    before, at, host = value.rpartition("@")
    scheme, mark, _ = before.partition("://")
    if not at or ":" not in before:
        return value
    return f"{scheme}{mark}{HIDDEN}@{host}" if mark else f"{HIDDEN}@{host}"
