"""LoRA adapters and quantised weights on any Equinox model with linear layers.

`_peft` and `_checkpoint` read and write their files.
"""
