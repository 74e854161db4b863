"""The loop of rounds: policies are called, plans dispatched, updates folded, versions closed and evaluated.

It knows simulation, configuration and advice, and neither checkpoints nor where it runs.
"""
