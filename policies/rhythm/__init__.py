"""When devices are sent and versions close: asynchronous rounds, over-selection, deadlines.

These policies choose no method of training.
"""
