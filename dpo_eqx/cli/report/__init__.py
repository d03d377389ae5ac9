"""The report of a run: pages, panels, curves and what they are read from.

The subcommand is in `commands`.
"""
