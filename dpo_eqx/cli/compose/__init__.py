"""From settings to the parts of a run: loss, optimiser, policies, data.

The run itself is in `run`.
"""
