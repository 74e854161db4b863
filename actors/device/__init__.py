"""The device: carries out one plan, packet bytes in, packet bytes out.

It imports messages and the parts of the model, and neither server nor pool.
"""
