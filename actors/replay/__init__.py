"""The replay buffer of views: packets in memory and on disk at the hosts, and the server's index of them.

It imports messages only.
"""
