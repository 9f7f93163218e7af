"""Values of variables, and texts such as logs, as they may be shown to others: secrets hidden."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vllm_ray_ascend.environment.table import SECRET, is_secret

HIDDEN = "***"

# A secret's name inside a value, its separator (a space for an option), and what is assigned to it.
_ASSIGNMENT = re.compile(
    rf"""([\w.-]*(?:{SECRET})[\w.-]*["']?\s*[=:\s]\s*)("[^"]*"|'[^']*'|(?:(?:Bearer|Basic)\s+)?[^\s&"']+)""",
    re.IGNORECASE,
)

_URL_USER = re.compile(r"(?<=://)[^\s/@\"'<>]+@")
_KNOWN_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA)[\w-]{12,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    re.DOTALL,
)
"""Private keys, tokens of hubs and clouds, JSON web tokens: by their form, whatever stands before them."""
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_LEAST_SECRET = 4
"""Shorter values of secret variables ("1", "no") are no secrets, and are found everywhere."""


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text, such as a log, with its secrets hidden: what looks like one, and the ``secrets`` that are known.

    It hides too much rather than too little: all that is assigned to a secret's name, or follows it.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _KNOWN_SECRETS.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", _URL_USER.sub(f"{HIDDEN}@", text))
    return _ASSIGNMENT.sub(rf"\1{HIDDEN}", text)


def secrets_of(environ: Mapping[str, str]) -> set[str]:
    """Return the secrets in an environment: values of secret variables, users and passwords in the URLs of others."""
    found = {value for name, value in environ.items() if is_secret(name)}
    for value in environ.values():
        before, at, _ = value.rpartition("@")
        if at and "://" in before:
            user = before.rpartition("://")[2]
            found |= {user, *user.split(":", 1)[1:]}
    return {value for value in found if len(value) >= _LEAST_SECRET}


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
