"""How long a tensor may take between two NPUs. Pure."""

from __future__ import annotations

from collections.abc import Mapping

DEFAULT_S = 120.0
_HCCL = "HCCL_EXEC_TIMEOUT"
_HCCL_DEFAULT_S = 1836
_SHARE = 0.8


def limit(setting_s: float, environ: Mapping[str, str]) -> float:
    """Seconds: what was set, or 120, or less where HCCL itself would give up sooner and say less of it."""
    if setting_s:
        return setting_s
    given = environ.get(_HCCL, "")
    exec_s = int(given) if given.isdigit() and int(given) else _HCCL_DEFAULT_S
    return min(DEFAULT_S, _SHARE * exec_s)
