"""The architecture of a decoder as data: one frozen configuration for all families.

`models/_checkpoint/families.py` maps each family's `config.json` to it.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embeddings, scaled or not.

    **Arguments:**

    - `theta`: the base of the wavelengths.
    - `fraction`: the rotated fraction of each head, from its front.
    - `kind`: the kind of scaling: `"default"` (none), `"linear"`, `"llama3"` or `"yarn"`.
    - `factor`: the factor by which the scaling extends the sequence length.
    - `original_length`: the sequence length before scaling, in tokens; for `"llama3"` and `"yarn"`.
    - `low_frequency`, `high_frequency`: for `"llama3"`, in turns over `original_length`.
        Frequencies below the range are divided by `factor`, those above it stay, and those inside
        are interpolated.
    - `slow`, `fast`: the same range for `"yarn"`.
    - `truncate`: whether `"yarn"` rounds that range to whole dimensions.
    - `amplitude`: the factor of cosines and sines; 1 except for `"yarn"`.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    slow: float = 1.0
    fast: float = 32.0
    truncate: bool = True
    amplitude: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a `Transformer`; by default its architecture is Llama's.

    **Arguments:**

    - `vocab`: the size of the vocabulary.
    - `width`: the width of the residual stream.
    - `layers`: the number of layers.
    - `heads`: the number of attention heads.
    - `key_heads`: the number of heads of keys and values, a divisor of `heads` (default: `heads`).
    - `head_width`: the width of a head (default: `width // heads`).
    - `feed_forward`: the inner width of the feed-forward block (default: `4 * width`).
    - `max_length`: the largest sequence length, in tokens; only enforced if positions are learned.
    - `family`: the family of checkpoints it belongs to, `model_type` in their `config.json`.
    - `activation`: `"silu"`, `"gelu"`, `"gelu_new"`, `"gelu_pytorch_tanh"` or `"relu"`.
    - `gated`: whether the activation gates a second projection.
    - `norm`: root-mean-square or layer normalisation. `norm_eps` is added to the mean square, and
        `norm_offset` to the weights.
    - `query_key_norm`: whether queries and keys are normalised, head by head.
    - `parallel`: whether attention and feed-forward read the same normalised input.
    - `post_norms`: whether the outputs of attention and feed-forward are normalised, too.
    - `rotary`: the rotary position embeddings; `None` for learned positions.
    - `query_bias`, `output_bias`, `feed_forward_bias`, `unembedding_bias`: which projections have
        a bias; `query_bias` is for queries, keys and values.
    - `tied`: whether the unembedding is the embedding.
    - `windows`: for each layer, the number of positions that a token sees, itself included; `None`
        for all (default: `None` for each layer).
    - `attention_scale`: the factor of the scores (default: `head_width ** -0.5`).
    - `attention_softcap`, `softcap`: the soft caps of the scores and of the logits.
    - `embedding_scale`: the factor of the embedded tokens.
    - `embedding_dropout`, `attention_dropout`, `residual_dropout`: dropout probabilities. Dropout
        applies only if the policy is called with a key.
    - `remat`: whether each layer is recomputed in the backward pass rather than stored.
    - `fused`: whether half-precision attention uses cuDNN's kernel on a GPU that has it.

    **Raises:**

    `ValueError` if a size is not positive or the sizes do not fit each other.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    key_heads: int = 0
    head_width: int = 0
    feed_forward: int = 0
    max_length: int = 2048
    family: str = "llama"
    activation: str = "silu"
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    query_key_norm: bool = False
    parallel: bool = False
    post_norms: bool = False
    rotary: Rotary | None = Rotary()
    query_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    unembedding_bias: bool = False
    tied: bool = False
    windows: tuple[int | None, ...] = ()
    attention_scale: float = 0.0
    attention_softcap: float | None = None
    softcap: float | None = None
    embedding_scale: float = 1.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    remat: bool = False
    fused: bool = True

    def __post_init__(self):
        # Sizes first, since the defaults divide by them.
        check_sizes(self)
        self._default("key_heads", self.heads)
        self._default("head_width", self.width // self.heads)
        self._default("feed_forward", 4 * self.width)
        self._default("windows", (None,) * self.layers)
        self._default("attention_scale", self.head_width**-0.5)
        check_fit(self)

    def _default(self, name: str, value: object) -> None:
        # A frozen dataclass can only be set this way.
        if not getattr(self, name):
            object.__setattr__(self, name, value)


def check_sizes(config: Config) -> None:
    """Raises if a size is not positive, or negative if it has a default."""
    for name in ("vocab", "width", "layers", "heads", "max_length"):
        if not getattr(config, name) > 0:
            raise ValueError(f"`{name}` must be positive; got {getattr(config, name)}.")
    for name in ("key_heads", "head_width", "feed_forward"):
        if not getattr(config, name) >= 0:
            raise ValueError(
                f"`{name}` must be positive, or 0 for its default; got {getattr(config, name)}."
            )


def check_fit(config: Config) -> None:
    """Raises if the numbers of heads, the windows or the rotated width do not fit."""
    if config.heads % config.key_heads:
        raise ValueError(
            f"`heads` must be a multiple of `key_heads`; got {config.heads} and {config.key_heads}."
        )
    if len(config.windows) != config.layers:
        raise ValueError(
            f"`windows` must have one entry per layer, {config.layers}; got {len(config.windows)}."
        )
    if config.rotary is not None and int(config.head_width * config.rotary.fraction) % 2:
        raise ValueError(
            f"The rotated part of a head must be even; got `head_width` {config.head_width} and "
            f"`rotary.fraction` {config.rotary.fraction}."
        )
