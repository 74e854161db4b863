"""The state of a run on disk: what a checkpoint may hold, how it is encoded, and when one is written.

It depends on the types that the engine keeps, not on how a run is started.
"""
