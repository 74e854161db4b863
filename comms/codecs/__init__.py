"""The built-in codecs: sparsifiers, quantisers, packing and lossless compression.

``make_codec`` makes a chain of them by name. Imports the codec contract and the entropy codec.
"""
