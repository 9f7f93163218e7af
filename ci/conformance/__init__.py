"""torch_npu's and vllm-ascend's own tests, unmodified, on software NPUs with our plugin active."""
