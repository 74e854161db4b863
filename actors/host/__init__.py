"""The partition host: it trains the blocks behind a cut for the devices that stream to it.

It knows the replay buffer and the device's legs.
"""
