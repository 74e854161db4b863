"""Policies that have the server work on the model of a round, beside the mean of the updates: ensemble distillation.

They change the plans of a selection before them.
"""
