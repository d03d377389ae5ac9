"""The decoder: its configuration, layers, attention and sampling.

`_checkpoint` reads and writes the files of checkpoints.
"""
