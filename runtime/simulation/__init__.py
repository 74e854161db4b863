"""Simulated time: clocks, links, streams, disruptions, and what plans cost.

It knows plans and fleets, and no settings of a run.
"""
