"""What a family of checkpoints is, as data: its keys of `config.json`, its tensors, its traits.

The tables of the families are in the modules that `families.py` joins.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._decoder.config import Config
from . import tensor_names as names
from .rotary_keys import ROTARY_KEYS

Values = Mapping[str, Any]
# What the names of classes of reward models end with.
CLASSIFIER = "ForSequenceClassification"


class Trait(NamedTuple):
    """A property that families share and that needs more than a table of keys.

    **Arguments:**

    - `read`: returns fields of `Config`, from all keys with defaults filled in; raises if a setting
        is not supported.
    - `write`: returns the keys, from a `Config`.
    """

    read: Callable[[Values], dict[str, Any]]
    write: Callable[[Config], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of checkpoints.

    **Arguments:**

    - `architecture`: the class that `transformers` loads it with.
    - `classifier`: the class of its reward models; `None` if `transformers` has none (default: as
        `architecture`, with another ending).
    - `names`: the module of a checkpoint that holds each parameter.
    - `defaults`: the default of each key of its `config.json`.
    - `keys`: the field of `Config` for each key.
    - `fixed`: fields with one value for the whole family.
    - `traits`: what reads and writes the remaining keys.
    - `rotary_keys`: the keys of rotary embeddings that the family reads.
    - `neutral`: the values of keys in published files that `transformers` does not read, and that
        say what the family is anyway; an ellipsis stands for any value.
    - `heads`: a regular expression for the tensors of heads that predict further tokens. They are
        left out, as by `transformers`.
    - `constants`: the numbers that its checkpoints store beside the parameters, by name; with `{}`
        for the number of the layer.
    """

    architecture: str
    classifier: str | None = ""
    names: Mapping[str, names.Source]
    defaults: Values
    keys: Mapping[str, str]
    fixed: Values = dataclasses.field(default_factory=dict)
    traits: tuple[Trait, ...] = ()
    rotary_keys: tuple[str, ...] = ROTARY_KEYS
    neutral: Values = dataclasses.field(default_factory=dict)
    heads: str | None = None
    constants: Callable[[Config], Mapping[str, float]] = lambda config: {}

    def __post_init__(self):
        if self.classifier == "":
            stem = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
            # A frozen dataclass can only be set this way.
            object.__setattr__(self, "classifier", stem + CLASSIFIER)

    def read(self, values: Values) -> dict[str, Any]:
        """The fields of `Config` that the traits read."""
        return {key: value for trait in self.traits for key, value in trait.read(values).items()}

    def write(self, config: Config) -> dict[str, Any]:
        """The keys that the traits write."""
        return {key: value for trait in self.traits for key, value in trait.write(config).items()}

    def aliases(self) -> dict[str, str]:
        """For each other name of a key, the name in `keys`."""
        return {other: key for key, other in _ALIASES.items() if key in self.defaults}

    def reads(self) -> frozenset[str]:
        """All keys of a `config.json` that the family reads."""
        return frozenset({"model_type", *self.defaults, *self.aliases(), *self.rotary_keys})

    def constants_of(self, config: Config) -> dict[str, float]:
        """The numbers that a checkpoint stores beside the parameters, by the tensor's name."""
        return {
            name.format(layer): value
            for name, value in self.constants(config).items()
            for layer in range(config.layers)
        }


# GPT-2's names of keys, and the names in all other families. `transformers` reads either for the
# families with GPT-2's names, and either name of the number of experts.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
}

KEYS = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key_heads",
    "head_dim": "head_width",
    "intermediate_size": "feed_forward",
    "max_position_embeddings": "max_length",
    "hidden_act": "activation",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
    "attention_dropout": "attention_dropout",
}
"""The keys of Llama, which most families have."""

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
"""The defaults of Llama."""


def without(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A table without some of its keys."""
    return {key: value for key, value in table.items() if key not in keys}
