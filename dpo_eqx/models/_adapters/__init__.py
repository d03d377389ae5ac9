"""LoRA adapters and quantised weights on any Equinox model with linear layers.

Nothing here knows a file; `_peft` and `_checkpoint` do.
"""
