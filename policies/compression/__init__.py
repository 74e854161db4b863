"""Policies that compress updates and models: residuals between versions (ResFed).

They change the plans of a selection before them.
"""
