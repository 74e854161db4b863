"""Simulated time: clocks, network links, streams, availability, disruptions, and what plans cost.

It depends on plans and fleets, not on a run's settings.
"""
