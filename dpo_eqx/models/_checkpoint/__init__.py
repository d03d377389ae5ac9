"""Hugging Face checkpoints: reading and writing `config.json` and safetensors.

The decoder itself is in `_decoder`.
"""
