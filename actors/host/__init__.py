"""The partition host: trains the blocks behind a cut for the devices that stream to it.

It imports the replay buffer, and the device's module for its blocks.
"""
