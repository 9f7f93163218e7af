"""What differs between versions of vLLM, vllm-ascend and Ray, and the import hook."""
