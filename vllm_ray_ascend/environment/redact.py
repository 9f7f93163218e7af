"""Values of variables as they may be logged or printed: secrets hidden."""

from __future__ import annotations

import re

from vllm_ray_ascend.environment.table import SECRET, is_secret

HIDDEN = "***"

# A secret's name inside a value, its separator (a space for an option), and what is assigned to it.
_ASSIGNMENT = re.compile(
    rf"""([\w.-]*(?:{SECRET})[\w.-]*["']?\s*[=:\s]\s*)("[^"]*"|'[^']*'|(?:(?:Bearer|Basic)\s+)?[^\s&"']+)""",
    re.IGNORECASE,
)


def redact_value(name: str, value: str) -> str:
    """Return ``value`` with its secrets hidden: all of a secret variable's, in others the passwords inside.

    Hidden inside a value are a URL's user and password (``http_proxy=http://me:pw@proxy:3128``), and what is assigned
    to a secret's name (``--api-key abc``, ``?token=abc``, ``{"password": "abc"}``).
    """
    if is_secret(name):
        return HIDDEN if value else ""
    return _ASSIGNMENT.sub(rf"\1{HIDDEN}", _hide_url_user(value))


def _hide_url_user(value: str) -> str:
    # Up to the last "@": a password may contain any other character, and hiding too much beats hiding too little.
    before, at, host = value.rpartition("@")
    scheme, separator, _ = before.partition("://")
    if not at or ":" not in before:
        return value
    return f"{scheme}{separator}{HIDDEN}@{host}" if separator else f"{HIDDEN}@{host}"
