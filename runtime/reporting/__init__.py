"""What a person reads: progress, tables, the summary, and where weights come from.

It knows events and the configuration.
"""
