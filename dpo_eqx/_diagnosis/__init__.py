"""Diagnostics for each pair: comparisons of two policies, diagnoses of a loss, calibration.

Nothing here trains.
"""
