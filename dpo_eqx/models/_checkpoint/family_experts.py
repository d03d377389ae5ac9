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
    """Qwen 3: the layers that have experts, which must be all of them."""
    dense = set(values["mlp_only_layers"] or ())
    step, layers = values["decoder_sparse_step"], values["num_hidden_layers"]
    without = [i for i in range(layers) if i in dense or (i + 1) % step]
    if without:
        key = "mlp_only_layers" if dense else "decoder_sparse_step"
        raise ValueError(
            f"Every layer must have experts; `{key}` in config.json is {values[key]!r}, so that "
            f"{len(without)} of {layers} layers have none, which is not supported."
        )
    return {}


SPARSE_LAYERS = Trait(
    read_sparse_layers, lambda config: {"mlp_only_layers": [], "decoder_sparse_step": 1}
)


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
