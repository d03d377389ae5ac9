"""Equinox decoders that are Hugging Face checkpoints: loading, saving, adapters, sampling.

The core of the library never imports this; a policy may be any other callable pytree.
"""

from .config import Config as Config, Rotary as Rotary
from .generate import generate as generate
from .hf import read_config as read_config
from .load import load as load
from .lora import (
    LoRA as LoRA,
    add_lora as add_lora,
    lora_filter as lora_filter,
    merge_lora as merge_lora,
    without_lora as without_lora,
)
from .save import save as save
from .transformer import Transformer as Transformer
