"""The device: one plan from packet bytes to packet bytes.

It knows messages and the model's parts, and neither server nor pool.
"""
