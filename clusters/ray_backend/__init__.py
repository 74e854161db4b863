"""Ray: starting a local one, joining a cluster, checking its nodes, placing bundles.

Only files here and in the actors' Ray back end import it.
"""
