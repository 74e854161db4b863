"""What travels between server, devices and hosts: plans, updates, streams and labels, as bytes.

It knows plans and packets, and no actor.
"""
