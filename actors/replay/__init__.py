"""The replay buffer of views: packets in memory and on disk, and the server's index of them.

It knows messages only.
"""
