"""Checks of policies: their fields and statements, and the types of the decisions and states that they return.

They depend on the data types of the contract only.
"""
