"""The software NPU's errors: each message says what failed, with which values, and what fixes it."""

from __future__ import annotations


class SoftNpuError(RuntimeError):
    """The software NPU cannot be built, started or used here."""


class ClusterError(SoftNpuError):
    """A local cluster of software NPUs cannot be made, found or used as asked."""
