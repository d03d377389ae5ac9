"""A run in progress: its loop, state, checkpoints, folder, hosts and signals.

`compose` makes the parts that the loop calls.
"""
