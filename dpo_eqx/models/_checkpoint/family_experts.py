"""The traits of families with experts: which layers have them, and keys that only they have.

Windows and rotary embeddings of other families are in `family_keys.py`, `family_layers.py` and
`family_rotary.py`.
"""

from typing import Any

from .._decoder.config import Config
from .family import Trait, Values
from .family_rotary import with_default
from .rotary_keys import read_whole_rotary, write_rotary


def read_sparse_layers(values: Values) -> dict[str, Any]:
    """Qwen 3: the layers that have a dense block in place of experts."""
    only, step = set(values["mlp_only_layers"] or ()), values["decoder_sparse_step"]
    experts = values["num_experts"]
    dense = [
        not experts or layer in only or (layer + 1) % step != 0
        for layer in range(values["num_hidden_layers"])
    ]
    chosen = {} if experts else {"experts_per_token": 0}
    return {"dense": tuple(dense), **chosen}


def write_sparse_layers(config: Config) -> dict[str, Any]:
    """The inverse of `read_sparse_layers`, in the form that lists the layers."""
    dense = [layer for layer, own in enumerate(config.dense) if own]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


SPARSE_LAYERS = Trait(read_sparse_layers, write_sparse_layers)


def need_experts(values: Values) -> dict[str, Any]:
    """Raises if there are no experts: all families but Qwen 3 have some in each layer."""
    key = "num_experts" if "num_experts" in values else "num_local_experts"
    if not values[key]:
        raise ValueError(f"`{key}` in config.json must be a positive integer; got {values[key]}.")
    return {}


EXPERTS_IN_ALL_LAYERS = Trait(need_experts, lambda config: {})


def switched_window(values: Values) -> dict[str, Any]:
    """One window for all layers, if `use_sliding_window`."""
    window = values["sliding_window"] if values["use_sliding_window"] else None
    return {"windows": (window,) * values["num_hidden_layers"]}


def write_switched_window(config: Config) -> dict[str, Any]:
    """The inverse of `switched_window`."""
    window = config.windows[0]
    return {"use_sliding_window": window is not None, "sliding_window": window}


SWITCHED_WINDOW = Trait(switched_window, write_switched_window)

_GPT_OSS = with_default(
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
)
GPT_OSS_ROTARY = Trait(
    lambda values: {"rotary": read_whole_rotary(_GPT_OSS(values))},
    lambda config: write_rotary(config.rotary),
)
