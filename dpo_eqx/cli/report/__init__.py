"""The report of a run: its page, panels and curves, and the files that they come from.

The subcommand is in `commands`.
"""
