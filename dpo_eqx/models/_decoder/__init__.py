"""The decoder: its configuration, layers, attention and sampling.

Files of checkpoints are in `_checkpoint`.
"""
