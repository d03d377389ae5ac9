"""The records that the layers exchange, checked once, when they are created.

The layers above compute with them.
"""
