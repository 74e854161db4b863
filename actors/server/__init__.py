"""The server: the global model, the downlink of each plan, and the fold of updates.

It knows messages and no device.
"""
