"""Ray: starting a local one, joining a cluster, checking its nodes, placing bundles.

Beside the actors' Ray back end and the Ray session of the runtime, only files in this folder import Ray.
"""
