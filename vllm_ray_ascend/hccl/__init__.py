"""HCCL through ctypes: communicator, stream, watchdog; without Ray and without vLLM."""
