"""The loop of rounds: it calls policies, dispatches plans, folds updates, and closes and evaluates versions.

It depends on simulation, configuration, reporting and advice. It does not depend on checkpoints, nor on where it runs.
"""
