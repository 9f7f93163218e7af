"""`make bench-steps`: what an executor itself costs for each step of an engine, without a model."""
