"""Where a run's engine lives: in this process, or in an actor on Ray; how it is started, resumed and replaced.

It knows checkpoints and the engine, not the command line.
"""
