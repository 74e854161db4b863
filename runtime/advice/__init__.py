"""Methods compared for one experiment before it is trained.

It knows the costs that the simulated clock charges and the configuration.
"""
