"""What clients see of `vllm serve`: time to the first token and per further token, at fixed rates of requests."""
