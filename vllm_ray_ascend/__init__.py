"""vLLM over Ray on Ascend NPUs. Importing this package imports neither torch, Ray nor vLLM."""

__version__ = "0.1.0"
