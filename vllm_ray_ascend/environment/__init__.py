"""Scope of each environment variable (node or copied), and derivation of HCCL's variables."""
