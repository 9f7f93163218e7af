"""Our loggers stand below vLLM's, so that they share its level, format and handlers without any set-up of their own."""

from __future__ import annotations

import logging


def get_logger(module: str) -> logging.Logger:
    """The logger ``vllm.<module>``."""
    return logging.getLogger(f"vllm.{module}")
