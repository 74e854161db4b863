"""Settings of a run: typed, merged from layers, and checked against policies, model and data.

It knows nothing of a run that goes on.
"""
