"""The architecture of a decoder as data: one frozen configuration for all families.

`models/_checkpoint/families.py` maps each family's `config.json` to it, and `config_checks.py`
checks it.
"""

import dataclasses
from typing import Literal

from .config_checks import check_fit, check_sizes
from .recurrence import Recurrence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embeddings, scaled or not.

    Some kinds depend on the length of the sequence that a token belongs to: its real tokens,
    without padding. Up to `limit` tokens they do not.

    **Arguments:**

    - `theta`: the base of the wavelengths.
    - `fraction`: the rotated fraction of each head, from its front.
    - `kind`: the kind of scaling: `"default"` (none), `"linear"`, `"llama3"`, `"yarn"`,
        `"proportional"`, `"dynamic"` or `"longrope"`.
    - `factor`: the factor by which the scaling extends the sequence length.
    - `original_length`: the sequence length before scaling, in tokens; for all kinds from
        `"llama3"` on.
    - `low_frequency`, `high_frequency`: for `"llama3"`, in turns over `original_length`.
        Frequencies below the range are divided by `factor`, those above it stay, and those inside
        are interpolated.
    - `slow`, `fast`: the same range for `"yarn"`.
    - `truncate`: whether `"yarn"` rounds that range to whole dimensions.
    - `amplitude`: the factor of cosines and sines; 1 except for `"yarn"` and `"longrope"`.
    - `short_factors`, `long_factors`: for `"longrope"`, the divisor of each frequency in sequences
        of at most `original_length` tokens, and in longer ones.
    - `interleaved`: whether neighbours of a head are rotated against each other, rather than its
        first half against its second.
    - `reverse`: whether the angles are negative.
    - `query_growth`: rotated queries are multiplied by
        `1 + query_growth * log(1 + position // original_length)`.
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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    interleaved: bool = False
    reverse: bool = False
    query_growth: float = 0.0

    def stated_width(self, head_width: int) -> int:
        """The width that `fraction` states, before it is rounded up if it is odd."""
        return int(head_width * self.fraction)

    def rotated_width(self, head_width: int) -> int:
        """The width of the rotated part of a head."""
        # `"proportional"` has frequencies of zero instead of a part that is not rotated.
        width = head_width if self.kind == "proportional" else self.stated_width(head_width)
        # Rounded up to an even number, as in `transformers`: each frequency rotates a pair.
        return width + width % 2

    @property
    def limit(self) -> int | None:
        """The tokens up to which the length of a sequence has no effect; `None` if it never has."""
        return self.original_length if self.kind in ("dynamic", "longrope") else None


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
    - `activation`: `"silu"`, `"gelu"`, `"gelu_pytorch_tanh"`, `"relu"`, `"relu2"` or another one
        without parameters, by its name in `transformers`; or `"xielu"`, which has trained
        parameters.
    - `gated`: whether the activation gates a second projection.
    - `norm`: root-mean-square or layer normalisation. `norm_eps` is added to the mean square, and
        `norm_offset` to the weights.
    - `norm_weight`, `norm_bias`: whether norms have weights, and layer norms biases.
    - `query_key_norm`: whether queries and keys are normalised.
    - `query_key_norm_axes`: `"head"` normalises each head, with one weight for all; `"heads"` has
        weights for each head, and no biases; `"all"` normalises all heads at once.
    - `query_key_norm_last`: whether queries and keys are normalised after the rotation.
    - `parallel`: whether attention and feed-forward read the same input.
    - `parallel_norms`: whether parallel layers have a norm for each of the two.
    - `pre_norms`: whether the inputs of attention and feed-forward are normalised.
    - `post_norms`: whether the outputs of attention and feed-forward are normalised.
    - `embedding_norm`: whether the embedded tokens are normalised, by the norm after the last
        layer.
    - `rotary`: the rotary position embeddings; `None` for learned positions.
    - `rotaries`: for each layer its rotary position embeddings, or `None` for none (default:
        `rotary` in each layer). They rotate the same part of each head in the same way.
    - `query_bias`, `output_bias`, `feed_forward_bias`, `unembedding_bias`: which projections have
        a bias; `query_bias` is for queries, keys and values.
    - `tied`: whether the unembedding is the embedding; its bias is its own.
    - `windows`: for each layer, the number of positions that a token sees, itself included; `None`
        for all (default: `None` for each layer).
    - `projection_clip`: queries, keys and values are clipped to this absolute value, before the
        rotation and after a norm in front of it.
    - `attention_sinks`: whether each head has a trained score without a value, which takes part in
        the softmax over the keys.
    - `recurrence`: what replaces attention in recurrent layers.
    - `recurrent`: for each layer, whether it is recurrent (default: no layer is).
    - `attention_gate`: whether a sigmoid of a projection gates the output of attention.
    - `attention_scale`: the factor of the scores (default: `head_width ** -0.5`).
    - `attention_scale_by_layer`: whether the scores of a layer are also divided by its number,
        counted from 1.
    - `attention_softcap`, `softcap`: the soft caps of the scores and of the logits.
    - `embedding_scale`, `residual_scale`, `logit_scale`: the factors of the embedded tokens, of the
        outputs of attention and feed-forward, and of the logits before the soft cap.
    - `experts`: the number of experts in each feed-forward block; 0 for a dense block.
        `feed_forward_bias` is then for them.
    - `experts_per_token`: the number of experts that the router chooses for a token.
    - `expert_width`: the inner width of an expert (default: `feed_forward`).
    - `dense`: for each layer, whether it has a dense block in place of experts, of the inner width
        `feed_forward` (default: no layer has).
    - `normalised_routes`: whether the weights of the chosen experts sum to 1, rather than those of
        all experts.
    - `router_bias`: whether the router has a bias.
    - `swiglu_limit`, `swiglu_alpha`: if there is a limit, gates of experts are at most this limit,
        what they gate is clipped to this absolute value, and the activation is
        `(up + 1) * gate * sigmoid(swiglu_alpha * gate)`.
    - `embedding_dropout`, `attention_dropout`, `residual_dropout`: dropout probabilities. Dropout
        applies only if the policy is called with a key.
    - `dropout`: whether it then applies. If not, a key only serves the dropout of adapters.
    - `remat`: whether each layer is recomputed in the backward pass rather than stored.
    - `unroll`: whether the program of a whole row has the code of every layer, rather than a loop
        over the layers. It compiles longer, and on a GPU a step is faster.
    - `fused`: whether attention uses a kernel of the GPU or the TPU, if there is one that fits.

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
    norm_weight: bool = True
    norm_bias: bool = True
    query_key_norm: bool = False
    query_key_norm_axes: Literal["head", "heads", "all"] = "head"
    query_key_norm_last: bool = False
    parallel: bool = False
    parallel_norms: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    embedding_norm: bool = False
    rotary: Rotary | None = Rotary()
    rotaries: tuple[Rotary | None, ...] = ()
    query_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    unembedding_bias: bool = False
    tied: bool = False
    windows: tuple[int | None, ...] = ()
    projection_clip: float | None = None
    recurrence: Recurrence | None = None
    recurrent: tuple[bool, ...] = ()
    attention_gate: bool = False
    attention_sinks: bool = False
    attention_scale: float = 0.0
    attention_scale_by_layer: bool = False
    attention_softcap: float | None = None
    softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    dense: tuple[bool, ...] = ()
    normalised_routes: bool = True
    router_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.702
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    dropout: bool = True
    remat: bool = False
    unroll: bool = False
    fused: bool = True

    def __post_init__(self):
        # Sizes first, since the defaults divide by them.
        check_sizes(self)
        self._default("key_heads", self.heads)
        self._default("head_width", self.width // self.heads)
        self._default("feed_forward", 4 * self.width)
        if self.experts:
            self._default("expert_width", self.feed_forward)
        self._default("windows", (None,) * self.layers)
        self._default("attention_scale", self.head_width**-0.5)
        if set(self.rotaries) == {self.rotary}:
            # One form for one meaning, whatever the number of layers.
            object.__setattr__(self, "rotaries", ())
        check_fit(self)
        # One form for one meaning, as above.
        for name in ("recurrent", "dense"):
            if not any(getattr(self, name)):
                object.__setattr__(self, name, ())

    @property
    def mixers(self) -> tuple[str, ...]:
        """What mixes the tokens in each layer: `"attention"` or `"recurrence"`."""
        recurrent = self.recurrent or (False,) * self.layers
        return tuple("recurrence" if own else "attention" for own in recurrent)

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """The optional parts of each layer: what mixes its tokens, and its feed-forward block."""
        dense = self.dense or (False,) * self.layers
        blocks = ("dense_feed_forward" if own else "feed_forward" for own in dense)
        return tuple(zip(self.mixers, blocks, strict=True))

    @property
    def layer_rotaries(self) -> tuple[Rotary | None, ...]:
        """The rotary position embeddings of each layer."""
        return self.rotaries or (self.rotary,) * self.layers

    @property
    def length_limit(self) -> int | None:
        """The tokens up to which the length of a sequence has no effect; `None` if it never has."""
        limits = [rotary.limit for rotary in self.layer_rotaries if rotary is not None]
        return min((limit for limit in limits if limit is not None), default=None)

    def dropout_rate(self, place: Literal["embedding", "attention", "residual"]) -> float:
        """The probability of dropout in this place, if the policy is called with a key."""
        return getattr(self, f"{place}_dropout") if self.dropout else 0.0

    def _default(self, name: str, value: object) -> None:
        # A frozen dataclass can only be set this way.
        if not getattr(self, name):
            object.__setattr__(self, name, value)
