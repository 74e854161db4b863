"""How updates and models are coded: residuals between versions (ResFed).

These policies change plans of a selection before them.
"""
