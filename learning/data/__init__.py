"""Data sets by name, their partition over devices, batches and transforms.

Imports settings and seeds, but no models.
"""
