"""The entropy codec: symbols of a chain in one stream, close to what an adaptive model says they must cost.

It knows the codec contract and nothing of the other codecs.
"""
