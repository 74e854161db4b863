"""Cost of training a part: FLOPs, bytes and peak memory, counted on small training steps.

Imports parts and training.
"""
