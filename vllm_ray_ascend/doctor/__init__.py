"""`vllm-ray-ascend doctor`: facts of every node, checks of them, and reports. Collected, judged and printed apart."""
