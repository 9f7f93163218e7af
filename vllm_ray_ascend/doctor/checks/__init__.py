"""The checks, each a pure function of what was collected. `CHECKS` has them all by name, in the order of reports."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_ray_ascend.doctor.checks import devices, host, model, network, software
from vllm_ray_ascend.doctor.views import Check

CHECKS: Mapping[str, Check] = {
    check.name: check for checks in (devices, software, network, host, model) for check in checks.CHECKS
}
