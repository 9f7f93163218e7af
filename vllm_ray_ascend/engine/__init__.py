"""Engine cores: data parallel ranks as Ray actors, shutdown, recovery."""
