"""The entropy codec: all symbols of a chain in one stream, close to their entropy under an adaptive model.

From the codec (``codec``) down: one stream of many tensors (``stream``); the model of one tensor (``tensors``) and of its
parts (``density``, ``positions``, ``gaps``, ``signs``, ``alphabets``); symbols to bytes (``coders``, ``ans``, ``rans``);
frequency tables (``tables``). Imports the codec contract and no other codec.
"""
