"""Helpers over JAX: mapped axes, partitioning, microbatches, dtypes, paths.

Nothing here knows preferences, policies or losses.
"""
