"""Helpers over JAX: mapped axes, partitioning, microbatches, dtypes, paths.

Nothing here depends on preferences, policies or losses.
"""
