"""vLLM's own tests, from its source distribution, unmodified, against our executor and our queue on software NPUs."""
