"""What training a part costs: FLOPs, bytes, peak memory, counted on small training steps.

It knows parts and training.
"""
