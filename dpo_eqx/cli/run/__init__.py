"""A run that goes on: its loop, state, checkpoints, folder, hosts and signals.

The parts that it runs are made in `compose`.
"""
