"""The software NPU: CANN's runtime and HCCL on the CPU, on which the real torch_npu and vllm-ascend run unmodified.

Nothing here is imported on real NPUs.
"""

__version__ = "0.1.0"
