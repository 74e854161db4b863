"""Comparison of methods for one experiment before it is trained.

It depends on the costs that the virtual clock charges, and on the configuration.
"""
