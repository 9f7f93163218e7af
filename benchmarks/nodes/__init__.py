"""`make bench-nodes`: a step's message from the engine to all ranks, over nodes and ranks. See benchmarks/README.md."""
