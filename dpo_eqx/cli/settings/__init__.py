"""Settings: flags, files, their checks.

What is made of them is in `compose`.
"""
