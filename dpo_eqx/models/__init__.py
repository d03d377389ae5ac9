"""Equinox decoders of Hugging Face checkpoints: loading, saving, adapters, sampling.

The core of the library never imports this package; a policy may be any other callable pytree.
"""

from .._arrays.samples import Samples as Samples
from ._adapters.lora import (
    add_lora as add_lora,
    keyed_lora as keyed_lora,
    lora_filter as lora_filter,
    merge_lora as merge_lora,
    pin_lora as pin_lora,
    pinned_lora as pinned_lora,
    without_lora as without_lora,
)
from ._adapters.lora_layer import LoRA as LoRA
from ._adapters.quantize import (
    Quantized as Quantized,
    dequantize as dequantize,
    quantize as quantize,
)
from ._checkpoint.config_json import read_config as read_config
from ._checkpoint.load import load as load
from ._checkpoint.save import save as save
from ._decoder.config import Config as Config, Rotary as Rotary
from ._decoder.generate import generate as generate, sample as sample
from ._decoder.load_balance import (
    expert_load as expert_load,
    load_balancing_loss as load_balancing_loss,
    router_scores as router_scores,
    router_z_loss as router_z_loss,
)
from ._decoder.mixture import Mixture as Mixture
from ._decoder.recurrence import Recurrence as Recurrence
from ._decoder.reward_model import RewardModel as RewardModel, score_rewards as score_rewards
from ._decoder.transformer import Transformer as Transformer
from ._peft.load import load_lora as load_lora
from ._peft.save import save_lora as save_lora
