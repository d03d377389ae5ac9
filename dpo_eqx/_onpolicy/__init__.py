"""Preference data from completions that the policy has just drawn and that a reward has judged.

Public names are in `dpo_eqx`; nothing here draws completions or computes rewards.
"""
