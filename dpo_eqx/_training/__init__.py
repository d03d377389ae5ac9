"""Gradients, steps, evaluations, references and their metrics.

Nothing here is jitted, and no state is kept between calls.
"""
