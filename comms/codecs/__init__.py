"""Codecs by name: sparsifiers, quantisers, packers and lossless back ends.

Each is a row of ``make_codec``; they know the contract and the entropy coder.
"""
