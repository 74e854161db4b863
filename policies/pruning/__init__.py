"""How wide the model is on each device: the width that its speed and its memory allow (REFT, HeteroFL, FedRolex).

They change the plans of a selection before them.
"""
