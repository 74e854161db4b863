"""The state of a run on disk: what a checkpoint may hold, how it is encoded, and when one is written.

It knows the types that the engine keeps, not how a run is started.
"""
