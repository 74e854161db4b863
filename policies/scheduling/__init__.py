"""When plans are sent and versions close: asynchronous rounds, over-selection, deadlines.

These policies do not change how models are trained.
"""
