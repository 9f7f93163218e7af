"""A long run of a served engine: nothing hangs and nothing grows."""
