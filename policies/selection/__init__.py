"""Which devices take part: all, random, fastest, by deadline, power of choice, Oort.

Each policy reads the view and the plans of those before it.
"""
