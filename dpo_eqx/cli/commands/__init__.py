"""The subcommands of `dpo-eqx`, one file each.

Only `main.py` imports them.
"""
