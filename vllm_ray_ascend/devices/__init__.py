"""Lists, numbers and ranges of NPUs, and who owns which; pure functions."""
