"""From settings to the parts of a run: loss, optimiser, policies, data.

`run` executes the run.
"""
