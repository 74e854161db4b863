"""The command line: one file a command, and the exit codes.

It calls the Python API and may import everything below it.
"""
