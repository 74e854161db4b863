"""Links with memory: what both ends remember, predict, send and receive.

They know packets and the codec contract.
"""
