"""Benchmarks: engines, transports, and what they are compared with."""
