"""What a round of each method costs a fleet, and a sentence on which is cheaper.

It knows policies and estimates, and trains nothing.
"""
