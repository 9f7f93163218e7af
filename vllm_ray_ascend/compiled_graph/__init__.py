"""`CompiledGraphExecutor`: steps as a Ray compiled graph."""
