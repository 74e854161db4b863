"""Policies that train the model block by block."""
