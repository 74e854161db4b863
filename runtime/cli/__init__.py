"""The command line: its commands, and how it exits.

It calls the Python API, and may import everything below it.
"""
