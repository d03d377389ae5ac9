"""Adapters in the file format of PEFT, Hugging Face's library of adapters.

The adapters themselves are in `_adapters`.
"""
