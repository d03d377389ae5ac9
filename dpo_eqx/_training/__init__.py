"""Gradients, steps, evaluations, references and their metrics.

Nothing here is jitted and nothing is kept between calls.
"""
