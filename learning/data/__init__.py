"""Data sets by name, their partition over devices, batches and transforms.

It knows specifications and seeds, and no model.
"""
