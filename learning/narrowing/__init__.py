"""Narrow models: which channels of a model can be removed together, and models without some of them."""
