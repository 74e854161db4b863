"""Links: the server's and the device's end of a connection with memory, on which models are sent as residuals.

What both ends remember (``link``), predict (``predict``), send (``broadcast``) and receive (``receive``). Imports packets and
the codec contract, no codecs.
"""
