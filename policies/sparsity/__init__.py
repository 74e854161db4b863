"""Sparse training: how sparsely each device trains, and what its update holds."""
