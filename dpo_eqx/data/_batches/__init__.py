"""From rows to padded or packed batches, in an order that can be resumed.

Nothing here knows a text.
"""
