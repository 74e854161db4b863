"""The folder of a run and the files in it: event log, marker, and access to folders and URLs.

It depends on the configuration and the events.
"""
