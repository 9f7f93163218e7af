"""What vllm-ascend knows of the hardware, by the names that 0.23 to 0.33 have in common."""

from __future__ import annotations


def has_port_ranges() -> bool:
    """Whether HCCL may be given port ranges: not on Atlas A2, where CANN's fused communication does not take them."""
    from vllm_ascend.utils import AscendDeviceType, get_ascend_device_type

    return bool(get_ascend_device_type() != AscendDeviceType.A2)
