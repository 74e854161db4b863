"""Models in pieces: tracing, cuts, blocks, parts of a model, and auxiliaries.

Imports no training.
"""
