"""Time and bandwidth of tensors between NPUs, by every way there is: `make bench-transport`."""
