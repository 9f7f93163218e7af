"""Operators of the software NPU: loaded into every process that imports torch_npu under `softnpu exec`."""
