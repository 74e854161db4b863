"""Where the engine of a run is executed: in this process, or in an actor on Ray; how it is started, resumed and replaced.

Depends on checkpoints and the engine, not on the command line.
"""
