"""The records that cross the borders between layers, checked once where they are made.

What computes with them is in the layers above.
"""
