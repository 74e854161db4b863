"""The pool on Ray: workers, partition hosts, real devices, and what happens when one dies.

Nothing outside it in this package imports Ray.
"""
