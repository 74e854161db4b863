"""Checks of what policies are and return: fields, types, decisions and state.

They know the contract's data types only.
"""
