"""What a support bundle has of each node: ends of logs, records of failures. Secrets are hidden before they leave it.

Runs in a Ray task on each node, or with `--local`. Nothing is raised: what cannot be read is missing.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from vllm_ray_ascend.cluster.node_facts import raylet_environment
from vllm_ray_ascend.compat.ray_processes import session_log_folder
from vllm_ray_ascend.environment.redact import redact_json, redact_text, secrets_of


class _Rank(msgspec.Struct):
    pid: int


class _Failure(msgspec.Struct):
    ranks: list[_Rank]


Files = dict[str, bytes]
"""Compressed text by its path in the archive, below the node's folder."""

_LATEST_SESSION = Path("/tmp/ray/session_latest/logs")
_RAY_LOGS = ("worker-*", "raylet.*", "gcs_server.*", "monitor.*")
_FAILURES = "vllm_ray_ascend/failure-*.json"
_PLOG_VARIABLE = "ASCEND_PROCESS_LOG_PATH"
_PLOG = "**/plog*/plog-*.log"


def collect_files(limit_bytes: int, pids: Collection[int] = ()) -> Files:
    """Return this node's files: the last ``limit_bytes`` of Ray's logs, and as much of plog.

    ``pids`` are the processes of engines on this node whose plog is wanted; those of recorded failures are added.
    """
    started = raylet_environment()
    secrets = secrets_of(started) | secrets_of(os.environ)  # of one name the two may have different ones
    logs = session_log_folder() or _LATEST_SESSION
    return collect_from(logs, plog_folder({**os.environ, **started}), secrets, limit_bytes, pids)


def collect_from(
    logs: Path, plog: Path, secrets: Collection[str], limit_bytes: int, pids: Collection[int] = ()
) -> Files:
    """Return the files below Ray's folder ``logs`` and CANN's folder ``plog``, with ``secrets`` hidden."""
    records = {f"failures/{path.name}": path for path in _newest(logs.glob(_FAILURES))}
    texts = {name: _read_end(path, limit_bytes) for name, path in records.items()}
    wanted = {*map(str, pids), *_failed_pids(texts.values())}
    ray_logs = _newest(path for pattern in _RAY_LOGS for path in logs.glob(pattern))
    plogs = _newest(path for path in plog.glob(_PLOG) if path.name.removeprefix("plog-").partition("_")[0] in wanted)
    texts |= {f"ray/{path.name}": text for path, text in _ends(ray_logs, limit_bytes)}
    texts |= {f"plog/{path.relative_to(plog)}": text for path, text in _ends(plogs, limit_bytes)}
    return {
        name: zlib.compress((redact_json if name in records else redact_text)(text, secrets).encode())
        for name, text in texts.items()
    }


def plog_folder(environment: Mapping[str, str]) -> Path:
    """Return where CANN writes the logs of processes."""
    return Path(environment.get(_PLOG_VARIABLE) or Path(environment.get("HOME", "/root")) / "ascend" / "log")


def decode_files(files: Files) -> dict[str, str]:
    """Return the texts of `collect_files`."""
    return {str(name): zlib.decompress(content).decode() for name, content in files.items()}


def _failed_pids(records: Iterable[str]) -> Iterator[str]:
    """Yield the processes that records of failures name (executor/failure_record.py)."""
    for record in records:
        with contextlib.suppress(msgspec.MsgspecError):
            yield from (str(rank.pid) for rank in msgspec.json.decode(record, type=_Failure).ranks)


def _newest(paths: Iterable[Path]) -> list[Path]:
    """Return the files among ``paths``, the one written last first."""
    found = []
    for path in paths:
        try:
            if path.is_file() and not path.is_symlink():
                found.append((path.stat().st_mtime, path))
        except OSError:
            continue
    return [path for _, path in sorted(found, reverse=True)]


def _ends(paths: Iterable[Path], limit_bytes: int) -> Iterator[tuple[Path, str]]:
    """Yield the ends of files, ``limit_bytes`` of all of them together."""
    for path in paths:
        if limit_bytes <= 0:
            return
        text = _read_end(path, limit_bytes)
        limit_bytes -= len(text.encode())
        if text:
            yield path, text


def _read_end(path: Path, limit_bytes: int) -> str:
    """Return the last lines of a file; the first line is whole, since half a secret would not be recognised."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit_bytes))
            content = file.read(limit_bytes)
    except OSError:
        return ""
    text = content.decode(errors="replace")
    return text if size <= limit_bytes else text.partition("\n")[2]
