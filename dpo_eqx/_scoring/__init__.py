"""A policy run on a batch, giving the log-probability of each completion.

Losses and gradients are in `losses` and `_training`.
"""
