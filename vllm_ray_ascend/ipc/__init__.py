"""Sockets, JSON lines, and vLLM's message queue over shared memory and over TCP."""
