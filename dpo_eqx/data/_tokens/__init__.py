"""From records to rows of token ids, and their cache on disk.

Batches are made of rows in `_batches`.
"""
