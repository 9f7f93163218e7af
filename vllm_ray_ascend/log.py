"""Our loggers are children of vLLM's, so that they share its level, format and handlers."""

from __future__ import annotations

import logging


def get_logger(module: str) -> logging.Logger:
    """Return the logger ``vllm.<module>``."""
    return logging.getLogger(f"vllm.{module}")
