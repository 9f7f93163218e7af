"""`RayAscendExecutor`: starts, supervises, restarts and stops the workers."""
