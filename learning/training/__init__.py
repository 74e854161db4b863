"""Local training of whole and split models, losses, optimisers, evaluation and pretraining.

Imports parts and batches.
"""
