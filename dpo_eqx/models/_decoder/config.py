"""What a decoder is made of, as data: one frozen configuration for all families.

How a family's `config.json` becomes one of these is in `models/_checkpoint/families.py`.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embeddings, scaled or not.

    **Arguments:**

    - `theta`: the base of the wavelengths.
    - `fraction`: the part of each head that is rotated, from the front.
    - `kind`: `"default"`, `"linear"`, `"llama3"` or `"yarn"`.
    - `factor`: how many times longer sequences become by the scaling.
    - `original_length`: the length the model was first trained on, in tokens; for `"llama3"` and
        `"yarn"`.
    - `low_frequency`, `high_frequency`: of `"llama3"`, in turns over `original_length`: slower
        ones are stretched by `factor`, faster ones kept, those between interpolated.
    - `slow`, `fast`: the same of `"yarn"`.
    - `truncate`: whether `"yarn"` rounds that range to whole dimensions.
    - `amplitude`: of the cosines and sines; 1 but for `"yarn"`.
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
    """The configuration of a `Transformer`; what is left out is as in Llama.

    **Arguments:**

    - `vocab`, `width`, `layers`, `heads`: the sizes of the vocabulary, of the residual stream, of
        the stack and of attention.
    - `key_heads`: heads of keys and values, a divisor of `heads`; by default `heads`.
    - `head_width`: by default `width // heads`.
    - `feed_forward`: the inner width; by default four times `width`.
    - `max_length`: tokens that the model was made for; a limit where positions are learned.
    - `family`: whose checkpoints it reads and writes, as `model_type` in their `config.json`.
    - `activation`: `"silu"`, `"gelu"`, `"gelu_new"`, `"gelu_pytorch_tanh"` or `"relu"`.
    - `gated`: whether the activation gates a second projection.
    - `norm`: root-mean-square or layer normalisation, with `norm_eps`; `norm_offset` is added to
        its weights.
    - `query_key_norm`: whether queries and keys are normalised, head by head.
    - `parallel`: whether attention and feed-forward read the same normalised input.
    - `post_norms`: whether the output of both is normalised too.
    - `rotary`: `None` for learned positions.
    - `query_bias`, `output_bias`, `feed_forward_bias`, `unembedding_bias`: which projections have
        one; the first is that of queries, keys and values.
    - `tied`: whether the unembedding is the embedding.
    - `windows`: for each layer how many positions back a token sees, itself included; `None` for
        all. By default `None` everywhere.
    - `attention_scale`: of the scores; by default `head_width ** -0.5`.
    - `attention_softcap`, `softcap`: of the scores and of the logits.
    - `embedding_scale`: of the embedded tokens.
    - `embedding_dropout`, `attention_dropout`, `residual_dropout`: probabilities; they apply
        where the policy is given a key.
    - `remat`: whether each layer is recomputed in the backward pass rather than stored.
    - `fused`: whether attention in half precision goes through cuDNN's kernel on a GPU that has it.

    **Raises:**

    `ValueError` where the sizes do not fit each other.
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
        check_sizes(self)
        self._default("key_heads", self.heads)
        self._default("head_width", self.width // self.heads)
        self._default("feed_forward", 4 * self.width)
        self._default("windows", (None,) * self.layers)
        self._default("attention_scale", self.head_width**-0.5)
        check_fit(self)

    def _default(self, name: str, value: object) -> None:
        if not getattr(self, name):
            object.__setattr__(self, name, value)


def check_sizes(config: Config) -> None:
    """Raises if a size is not positive, or one that has a default is negative."""
    for name in ("vocab", "width", "layers", "heads", "max_length"):
        if not getattr(config, name) > 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(config, name)}.")
    for name in ("key_heads", "head_width", "feed_forward"):
        if not getattr(config, name) >= 0:
            raise ValueError(
                f"`{name}` must be positive, or 0 for its default; got {getattr(config, name)}."
            )


def check_fit(config: Config) -> None:
    """Raises if heads, windows or rotated widths do not fit each other."""
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
