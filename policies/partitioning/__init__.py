"""Where the model is cut between device and host: SplitFed, local losses, EcoFed.

These policies change plans of a selection before them.
"""
