"""`make bench-queues`: messages from one writer to readers on another node, by three ways. See benchmarks/README.md."""
