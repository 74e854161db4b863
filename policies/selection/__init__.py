"""Which devices take part: all, random, fastest, by deadline, power of choice, Oort.

Each of them chooses among all devices, or among the plans of the policies before it.
"""
