"""Local training: whole, in two legs or ahead of gradients; losses, optimisers, schedules and evaluation.

It knows parts and batches.
"""
