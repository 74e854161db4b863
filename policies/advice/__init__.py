"""The cost of a round of each method on a fleet, and a sentence that says which method is cheaper.

It uses policies and estimates, and trains nothing.
"""
