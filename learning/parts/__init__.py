"""Models in pieces: blocks, cuts, parts of a model, auxiliaries, and how tracing finds them.

It trains nothing.
"""
