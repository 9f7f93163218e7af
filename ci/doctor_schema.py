"""Writes docs/doctor.schema.json, the schema of `vllm-ray-ascend doctor --json`: python -m ci.doctor_schema."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from vllm_ray_ascend.doctor.records import Report

PATH = Path(__file__).resolve().parent.parent / "docs" / "doctor.schema.json"


def make_schema() -> str:
    """Return the schema as text."""
    return json.dumps(msgspec.json.schema(Report), indent=2) + "\n"


if __name__ == "__main__":
    PATH.write_text(make_schema())
