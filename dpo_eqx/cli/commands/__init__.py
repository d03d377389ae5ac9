"""The subcommands of `dpo-eqx`, one file each.

Only `_main.py` imports them.
"""
