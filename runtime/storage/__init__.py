"""The folder of a run and the files in it: event log, marker, and access to folders and URLs.

It knows the configuration and the events.
"""
