"""Reports of a run: progress, the summary, and the provenance of initial weights.

It depends on events and the configuration.
"""
