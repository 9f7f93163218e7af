"""`make bench-scale`: what an engine's owner does, over the number of its ranks. See benchmarks/README.md."""
