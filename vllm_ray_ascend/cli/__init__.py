"""The command `vllm-ray-ascend`, one file for each subcommand."""
