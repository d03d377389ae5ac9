"""Adapters in the files of PEFT.

The adapters themselves are in `_adapters`.
"""
