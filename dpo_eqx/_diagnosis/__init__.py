"""What each pair was worth: comparisons of two policies, diagnoses of a run, calibration.

Nothing here trains.
"""
