"""The flags of the commands by group, as `--help` shows them.

`settings.py` puts together those of `train`.
"""
