"""Tests on NPUs and GPUs import torch where one of the two is missing: torch_npu is then not to be loaded with it."""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
