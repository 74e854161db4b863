"""Settings of a run: typed, merged from layers, and checked against policies, model and data.

It does not depend on the code that executes a run.
"""
