"""Runs a policy on a batch, and returns the log-probability of each completion.

Losses and gradients are in `losses` and `_training`.
"""
