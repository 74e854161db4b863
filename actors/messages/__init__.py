"""Messages between server, devices and partition hosts: plans, updates, activations and labels, as bytes.

It imports the contracts of plans and packets, and no actor.
"""
