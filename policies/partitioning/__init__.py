"""Policies that cut the model between device and host: SplitFed, local losses, EcoFed.

They change the plans of a selection before them.
"""
