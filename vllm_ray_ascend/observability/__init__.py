"""Metrics and events of an engine: one table of metrics, their values in a process, what happened to the engine."""
