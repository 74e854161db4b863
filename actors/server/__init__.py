"""The server: the global model, the downlink of each plan, and the fold of updates.

It exchanges messages with devices, and does not know where they run.
"""
