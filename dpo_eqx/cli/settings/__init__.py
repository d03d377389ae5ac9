"""Settings: flags, files, their checks.

`compose` makes the parts of a run from them.
"""
