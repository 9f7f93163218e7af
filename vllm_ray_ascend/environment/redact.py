"""Values of variables, and texts such as logs, as they may be shown to others: secrets hidden.

Texts may have megabytes in one line: each pattern begins with a literal word, and what is optional in it has a limit,
so that the time grows with the length alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vllm_ray_ascend.environment.table import SECRET, is_secret

HIDDEN = "***"

_QUOTE = r"""\\{0,8}["']"""
"""Of text in JSON in JSON, with all its backslashes."""
_SETS = r"\s{0,8}[=:]{1,2}>?\s{0,8}"
_LISTED = rf"\s{{0,8}},\s{{0,8}}(?=b?{_QUOTE}[^\"'\n]{{0,512}}[\"']\s{{0,8}}[,\])])"
"""Between an option and its value in a list of arguments; the next key of a dictionary has a colon behind it."""
_ASSIGNED = re.compile(
    rf"(?:{SECRET})[\w.-]{{0,64}}(?:{_QUOTE})?[\])]?(?:{_SETS}|{_LISTED}|[ \t]{{1,64}})"
    rf"|(?:\b(?:PASS|PWD|PW|AUTH|SIG)\b|SIGNATURE|[?&]KEY)(?:{_QUOTE})?[\])]?{_SETS}",
    re.IGNORECASE,
)
"""The end of a secret's name, and what stands between it and its value. Of words that mean other things too, such as
"pwd", an assignment alone."""
_OPENING = re.compile(
    rf"(?:[bruf]{{1,2}}(?=\\|[\"']))?(?P<quote>{_QUOTE})|(?:[a-z_][\w.]{{0,64}})?[\[({{]", re.IGNORECASE
)
"""What begins a value that may have blanks: a quote, or a bracket, of a call such as SecretStr('abc') as well."""
_IN_BRACKETS = re.compile(
    rf"(?P<quote>{_QUOTE})|(?P<open>[\[({{])|(?P<close>[\])}}])"
    r"|(?P<stop>(?<![,\[({ \t\r])[ \t\r]{0,8}\n(?!\s{0,200}[\])}]))"
)
"""A group continues on the next line behind a comma or a bracket, and before one."""
_CLOSING = {mark: re.compile(rf"(?<!\\)(?P<before>\\*){mark}|\n") for mark in ('"', "'")}
_LONGEST_GROUP = 4096
_BARE = re.compile(
    r"""(?:(?:Bearer|Basic|Digest)[ \t]{1,8})?(?:[^\s&"'\\]|["'](?=\w)|\\(?!\\{0,8}["']))*""", re.IGNORECASE
)
_REST = re.compile(r"""[^\s&"',;)\]}\\]*""")
"""What follows a quote or a bracket without a blank."""
_HEADER = re.compile(r"(?:AUTHORIZATION|COOKIE)[\w-]{0,64}:", re.IGNORECASE)
_LINE = re.compile(r"""(?:=\\{0,8}"[^"\r\n]*"|[^\r\n"'])*""")
_REACH = 100

_URL_USER = re.compile(r"(?<=://)[^\s/\"'<>]{1,512}@")
_OPTION_USER = re.compile(r"""(?<![\w-])((?:-u|-U|--user|--proxy-user)(?:=|\s{0,8})["']?)[^\s:"']{1,256}:[^\s"']+""")
"""As `curl -u me:pw` has it."""
_KNOWN_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,32}PRIVATE KEY-----|\Z)"
    r"|\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|AIza|nvapi-)[\w-]{12,}"
    r"|\beyJ[\w-]{8,512}\.[\w.-]{8,}",
    re.DOTALL,
)
"""Private keys, tokens of hubs and clouds, JSON web tokens: by their form, whatever stands before them."""
_END_OF_KEY = re.compile(r"-----END [A-Z ]{0,32}PRIVATE KEY-----")
_LONGEST_KEY = 16384
_BEARER = re.compile(r"\b(Bearer|Basic)\s{1,8}[\w.~+/=-]{6,}", re.IGNORECASE)
_LEAST_SECRET = 4
"""Shorter values of secret variables ("1", "no") are no secrets, and are found everywhere."""


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text, such as a log, with its secrets hidden: what looks like one, and the ``secrets`` that are known.

    It hides too much rather than too little: all that is assigned to a secret's name, or follows it.
    """
    text = _hide_rest_of_key(_KNOWN_SECRETS.sub(HIDDEN, hide_known(text, secrets)))
    text = _OPTION_USER.sub(rf"\1{HIDDEN}", _URL_USER.sub(f"{HIDDEN}@", text))
    return _hide_assigned(_BEARER.sub(rf"\1 {HIDDEN}", text))


def redact_json(text: str, secrets: Collection[str] = ()) -> str:
    """Return JSON with its secrets hidden in keys' values and in strings, as JSON; another text as `redact_text`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return redact_text(text, secrets)
    return json.dumps(_redact_leaves(values, secrets), indent=2) + "\n"


def hide_known(text: str, secrets: Iterable[str]) -> str:
    """Return a text without the ``secrets``, and without what JSON makes of them."""
    forms = {form for secret in secrets for form in (secret, json.dumps(secret)[1:-1])}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text


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
    return redact_text(_hide_url_user(value))


def _redact_leaves(value: Any, secrets: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {
            hide_known(name, secrets): HIDDEN if each and is_secret(name) else _redact_leaves(each, secrets)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [_redact_leaves(each, secrets) for each in value]
    if isinstance(value, str):
        return redact_text(value, secrets)
    return HIDDEN if str(value) in secrets else value


def _hide_assigned(text: str) -> str:
    parts, done = [], 0
    while found := _ASSIGNED.search(text, done):
        end = _value_end(text, found)
        parts += [text[done : found.end()], HIDDEN if end > found.end() else ""]
        done = end
    return "".join([*parts, text[done:]])


def _value_end(text: str, found: re.Match[str]) -> int:
    """Return where the value ends that is assigned to the name of ``found``."""
    while True:
        start = found.end()
        if opened := _OPENING.match(text, start):
            end = _quoted_end(text, opened) if opened["quote"] else _group_end(text, start)
            return _matched_end(_REST, text, end)
        if _HEADER.match(found[0]):
            return _matched_end(_LINE, text, start)
        end = _matched_end(_BARE, text, start)
        # A word that is itself a secret's name: "password: token abc".
        names = _ASSIGNED.finditer(text, start, end + _REACH)
        last = next((name for name in names if name.end() >= end), None)
        if last is None or last.start() >= end:
            return end
        found = last


def _quoted_end(text: str, opened: re.Match[str]) -> int:
    """Return where a quotation ends: behind the quote that closes it, else at the end of the line.

    With k backslashes before the first quote, so many stand before the last one, and each backslash of what is quoted
    is 2 (k + 1) of them.
    """
    backslashes = len(opened["quote"]) - 1
    for found in _CLOSING[opened["quote"][-1]].finditer(text, opened.end()):
        if found["before"] is None:
            return found.start()
        before = len(found["before"])
        if before <= backslashes or before % (2 * backslashes + 2) == backslashes:
            return found.end()
    return len(text)


def _group_end(text: str, start: int) -> int:
    """Return where a group in brackets ends; one that is not closed, at the end of a line or at its greatest length."""
    depth, position, limit = 0, start, min(len(text), start + _LONGEST_GROUP)
    while found := _IN_BRACKETS.search(text, position, limit):
        if found["stop"]:
            return found.start()
        position = _quoted_end(text, found) if found["quote"] else found.end()
        depth += bool(found["open"]) - bool(found["close"])
        if depth == 0 and found["close"]:
            return position
    return max(position, limit)


def _matched_end(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return found.end() if found else start


def _hide_rest_of_key(text: str) -> str:
    """Return a text without private keys whose first lines were cut off, as at the beginning of the end of a log."""
    parts, done = [], 0
    for found in _END_OF_KEY.finditer(text):
        parts += [text[done : max(done, found.start() - _LONGEST_KEY)], HIDDEN]
        done = found.end()
    return "".join([*parts, text[done:]])


def _hide_url_user(value: str) -> str:
    # Up to the last "@": a password may contain any other character, and hiding too much beats hiding too little.
    before, at, host = value.rpartition("@")
    scheme, separator, _ = before.partition("://")
    if not at or ":" not in before:
        return value
    return f"{scheme}{separator}{HIDDEN}@{host}" if separator else f"{HIDDEN}@{host}"
