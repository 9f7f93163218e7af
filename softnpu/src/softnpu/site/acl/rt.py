"""The module acl.rt: each function returns the CANN error code, after its results if it has any."""

import ctypes

from . import _library


def get_device_count() -> tuple[int, int]:
    count = ctypes.c_uint32(0)
    code = int(_library.aclrtGetDeviceCount(ctypes.byref(count)))
    return count.value, code


def set_device(device: int) -> int:
    return int(_library.aclrtSetDevice(ctypes.c_int32(device)))


def get_device() -> tuple[int, int]:
    device = ctypes.c_int32(-1)
    code = int(_library.aclrtGetDevice(ctypes.byref(device)))
    return device.value, code


def reset_device(device: int) -> int:
    return int(_library.aclrtResetDevice(ctypes.c_int32(device)))


def get_mem_info(attribute: int) -> tuple[int, int, int]:
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    code = int(_library.aclrtGetMemInfo(ctypes.c_int(attribute), ctypes.byref(free), ctypes.byref(total)))
    return free.value, total.value, code


def memcpy(destination: int, capacity: int, source: int, size: int, kind: int) -> int:
    void, count = ctypes.c_void_p, ctypes.c_size_t
    return int(_library.aclrtMemcpy(void(destination), count(capacity), void(source), count(size), ctypes.c_int(kind)))
