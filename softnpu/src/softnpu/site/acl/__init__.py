"""CANN's Python interface (pyACL), as far as Ray and vllm-ascend use it, over the software NPU's libascendcl.so."""

import ctypes
import os

_library = ctypes.CDLL(os.path.join(os.environ["SOFTNPU_LIB"], "libascendcl.so"))
_library.aclrtGetSocName.restype = ctypes.c_char_p

from . import rt  # noqa: E402


def init(config: str | None = None) -> int:
    return int(_library.aclInit(None))


def finalize() -> int:
    return int(_library.aclFinalize())


def get_soc_name() -> str:
    return str(_library.aclrtGetSocName().decode())


__all__ = ["finalize", "get_soc_name", "init", "rt"]
