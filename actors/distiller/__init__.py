"""The distiller: trains the server's models on the public set, towards the logits of the devices' models.

It imports messages, and the device's module for its models.
"""
