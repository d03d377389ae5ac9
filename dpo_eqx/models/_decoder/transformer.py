"""The decoder: embedding, a scanned stack of layers, unembedding, for one sequence at a time.

`layer.py` has one layer; a `Config` chooses the family.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray, PyTree

from ..._arrays.layout import Layout
from ..._arrays.packed import PackedLayout
from ..._arrays.tokens import as_ids
from ..._head.tiles import Unembedding
from ..._jax.dtypes import is_narrow
from ..._jax.explicit_meshes import automatic
from ..._jax.partitioning import join_tokens, keep_rows, split_tokens
from ..._jax.rounding import rounded
from . import incremental
from .attention import attend_by_layout, masks
from .basic_layers import Bias, Embedding, Linear, Norm, dropout, scaled
from .blocks import Caches, keep_own, run_layers, scan_layers, take_apart
from .by_layer import choose_masks, choose_tables
from .companion_files import Origin
from .config import Config
from .half_precision_scan import as_bits, from_bits
from .layer import Layer
from .links import Links, links_of, one_sequence
from .random_parts import with_keys
from .row_limits import is_too_long, real_tokens


class Transformer(eqx.Module):
    """A decoder of one of the families, for one sequence; `jax.vmap` it over a batch.

    It implements `FastPolicy`. Layers are stacked: each leaf of `layers` has a leading axis of
    size `config.layers`, and `lax.scan` runs them, so that compile time does not grow with depth.
    In a hybrid, leaves of `layers.attention` and `layers.recurrence` have only the layers with
    attention and the recurrent layers along that axis. If some layers have no experts, the same
    holds for `layers.feed_forward` and `layers.dense_feed_forward`.
    Dropout applies only if a key is given.

    ```python
    config = models.Config(vocab=256, width=128, layers=4, heads=4)
    policy = models.Transformer(config, key=jax.random.key(0))
    logits = policy(ids)
    ```

    **Arguments:**

    - `config`: the architecture and all sizes. `embedding.weight` has shape `(vocab, width)`, and
        so has `head.weight`; if the unembedding is tied, `head` has at most a bias.
    - `key`: the random key of the initial parameters, which are float32.
    - `origin`: the tokenizer and other files of a checkpoint; `models.load` fills it.
    """

    embedding: Embedding
    positions: Embedding | None
    layers: Layer
    norm: Norm
    head: Linear | Bias | None
    config: Config = eqx.field(static=True)
    origin: Origin = eqx.field(static=True)

    def __init__(self, config: Config, *, key: PRNGKeyArray, origin: Origin | None = None):
        keys = jax.random.split(key, 4)
        self.embedding = Embedding(config.vocab, config.width, key=keys[0])
        learned = Embedding(config.max_length, config.width, key=keys[1])
        self.positions = learned if config.rotary is None else None
        stack = jax.random.split(keys[2], config.layers)
        layers = eqx.filter_vmap(lambda key: Layer(config, key=key))(stack)
        self.layers = keep_own(layers, config)
        self.norm = Norm(config.width, config)
        bias = config.unembedding_bias
        head = Linear(config.vocab, config.width, bias=bias, scale=0.02, key=keys[3])
        of_tied = Bias(config.vocab) if bias else None
        self.head = of_tied if config.tied else head
        self.config = config
        self.origin = Origin() if origin is None else origin

    @partial(automatic, like=1)
    def __call__(
        self, ids: Integer[Array | np.ndarray, " length"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "length vocab"]:
        """The logits of the token after each position, in float32 or wider.

        **Arguments:**

        - `ids`: token ids, integers of any dtype. Shape `(length,)`.
        - `key`: the random key of dropout; without it no dropout applies.
        """
        self.check_length(ids.size)
        layout = Layout(jnp.asarray(ids.size), ids.size, ())
        return self.unembed(self.hidden(ids, layout, key=key))

    @partial(automatic, like=1)
    def hidden(
        self,
        ids: Integer[Array | np.ndarray, " length"],
        layout: Layout | PackedLayout,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "length width"]:
        """The last hidden states of a row with this layout, normalised.

        If positions are learned, a row with more tokens than `config.max_length` gives NaN, since
        the number of its tokens is not known when the function is traced. Padding needs no
        position.

        **Arguments:**

        - `ids`: token ids, integers of any dtype. Shape `(length,)`.
        - `layout`: the positions in the row, and which tokens attend to which.
        - `key`: the random key of dropout; without it no dropout applies.

        **Raises:**

        `ValueError` if

        - positions are learned, the row may be longer than `config.max_length`, and the layout does
          not say how many tokens are real;
        - `shares_prompts` is false for the row, and it has several completions.
        """
        beyond = is_too_long(self, layout)
        hidden, _ = self.run_row(as_ids(ids), layout, key=key)
        return hidden if beyond is None else jnp.where(beyond, jnp.nan, hidden)

    def run_row(
        self,
        ids: Int[Array, " length"],
        layout: Layout | PackedLayout,
        *,
        key: PRNGKeyArray | None = None,
        observe: Callable[[Layer, Array], Any] | None = None,
    ) -> tuple[Float[Array, "length width"], Any]:
        """Does what `run` does, for a row with this layout and without a cache."""
        tokens = real_tokens(self, layout)

        def attend(query, key, value, sinks, masks, cache, rng):
            return attend_by_layout(
                layout, query, key, value, masks, sinks=sinks, config=self.config, rng=rng
            ), None

        links = links_of(layout) if any(self.config.recurrent) else None
        return self.run(
            ids,
            layout.positions,
            attend,
            partial(masks, layout),
            tokens=tokens,
            links=links,
            key=key,
            observe=observe,
        )

    def run(
        self,
        ids: Int[Array, " length"],
        positions: Int[Array, " length"],
        attend: Callable[..., tuple[Array, Any]],
        masks_of: Callable[[int | None], Any],
        *,
        tokens: Int[Array, ""] | None = None,
        links: Links | None = None,
        caches: Caches | None = None,
        layers: Sequence[tuple[PyTree, Caches]] | None = None,
        key: PRNGKeyArray | None = None,
        observe: Callable[[Layer, Array], Any] | None = None,
    ) -> tuple[Float[Array, "length width"], Caches | tuple[Caches, ...]]:
        """Runs the whole stack, with an attention function from the caller.

        **Arguments:**

        - `ids`, `positions`: the tokens and their positions. Shape `(length,)`.
        - `attend`: `(query, key, value, sinks, masks, cache, rng) -> (output, cache)` for one
            layer.
        - `masks_of`: returns the masks for `attend`, from the window of a layer.
        - `tokens`: the number of real tokens of the sequence; `None` if it is at most the limit of
            the rotary embeddings.
        - `links`: which token follows which, for recurrent layers (default: each follows the one
            before it).
        - `caches`: what `attend` gets as `cache`, and the states of recurrent layers before the
            row (default: zeros); each layer gets its slice.
        - `layers`: the arrays and caches of each layer, to run them without a loop. They replace
            `caches` and the arrays of the stack.
        - `key`: the random key of dropout; without it no dropout applies.
        - `observe`: a function of a layer and the input of its `feed_forward`, whose results are
            returned in place of the caches.

        **Returns:**

        The normalised hidden states; the caches that `attend` returned, and the states of recurrent
        layers after the last real token. They are stacked, or those of each layer.
        """
        config = self.config
        first, key = (None, None) if key is None else jax.random.split(key)
        keys = None if key is None else jax.random.split(key, config.layers)
        x = dropout(self._embed(ids, positions), config.dropout_rate("embedding"), first)
        x = self.norm(x) if config.embedding_norm else x
        tables_in, which_tables = choose_tables(config, positions, tokens, x.dtype)
        masks_in, which_masks = choose_masks(masks_of, config.windows)
        by_layer = config.attention_scale_by_layer
        numbers = jnp.arange(1, config.layers + 1) if by_layer else None
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        # Without rematerialisation, each layer would store a copy of what it reads from bits.
        bits = as_bits(arrays) if config.remat else None

        # A layer that is computed again keeps its input, and only that.
        join, split = (join_tokens, split_tokens) if config.remat else (keep_rows, keep_rows)

        def body(kind, x, inputs):
            mixer, block = kind
            arrays, bits, caches, (which_masks, which_tables, number, key) = inputs
            key, rng = (None, None) if key is None else jax.random.split(key)

            def attend_here(query, key, value, sinks):
                masks, cache = masks_in(which_masks), caches.attention
                if number is not None:
                    query = rounded(query / number.astype(query.dtype))
                return attend(query, key, value, sinks, masks, cache, rng)

            arrays = arrays if bits is None else from_bits(arrays, bits, x)
            layer = eqx.combine(arrays, static)
            # A key of its own, so that the other draws are the same with adapters and without.
            layer = with_keys(layer, None if key is None else jax.random.fold_in(key, 2))
            tables = tables_in(which_tables)

            def mix(x):
                if mixer == "attention":
                    return layer.attention(x, tables, attend_here, config=config)
                own_links = one_sequence(ids.size) if links is None else links
                return layer.recurrence(x, own_links, caches.recurrence, config=config)

            seen_by = observe if block == "feed_forward" else None
            x, cache = layer(join(x), mix, config=config, block=block, key=key, observe=seen_by)
            return split(join(x)), Caches(**{mixer: cache})

        chosen = (which_masks, which_tables, numbers, keys)
        if layers is None:
            stacks = (arrays, bits, caches or Caches(), chosen)
            # A token at a time, straight code would copy each layer out of the stack.
            how = {"remat": config.remat, "unroll": config.unroll and caches is None}
            x, new_caches = scan_layers(body, join(x), stacks, config.kinds, **how)
        else:
            each = zip(layers, take_apart(chosen, config.kinds), strict=True)
            inputs = [(arrays, None, caches, chosen) for (arrays, caches), chosen in each]
            x, new_caches = run_layers(body, x, inputs, config.kinds)
        # In half precision the norm is recomputed too: nothing that it keeps for the backward pass
        # then changes how the forward pass rounds.
        norm = eqx.filter_checkpoint(self.norm) if is_narrow(x) else self.norm
        return scaled(norm(x), config.logit_scale), new_caches

    @partial(automatic, like=1)
    def unembed(self, hidden: Float[Array, "length width"]) -> Float[Array, "length vocab"]:
        """Logits from hidden states, in float32 or wider."""
        head = Unembedding(self.unembedding, self.unembedding_bias, self.softcap)
        return head.logits(hidden)

    # The methods of `RecurrentPolicy`.
    start, extend = incremental.start, incremental.extend

    @property
    def unembedding(self) -> Float[Array, "vocab width"]:
        """The output embedding of each token; if they are tied, the embedding itself."""
        if self.head is None or isinstance(self.head, Bias):
            return self.embedding.weight
        return self.head.weight

    @property
    def unembedding_bias(self) -> Float[Array, " vocab"] | None:
        """The bias of the logits, if the family has one."""
        return None if self.head is None else self.head.bias

    @property
    def softcap(self) -> float | None:
        """The soft cap of the logits, if the family has one."""
        return self.config.softcap

    @property
    def rounds_alike(self) -> bool:
        """True: the forward pass rounds at the same places, whether it is differentiated or not."""
        return True

    def check_length(self, length: int) -> None:
        """Raises if positions are learned and are fewer than `length`."""
        if self.positions is not None and length > self.config.max_length:
            raise ValueError(
                f"This policy has learned positions for rows of at most {self.config.max_length} "
                f"tokens; got a row of up to {length}. Shorten prompts and completions so that "
                "they stay within it together."
            )

    def shares_prompts(self, longest: int) -> bool:
        """Whether a prompt has the same hidden states whatever follows it.

        It is false if the rotary embeddings depend on the length of the sequence, and a prompt with
        its completion may have `longest` tokens, which is more than their limit.
        """
        limit = self.config.length_limit
        return limit is None or longest <= limit

    def _embed(
        self, ids: Int[Array, " length"], positions: Int[Array, " length"]
    ) -> Float[Array, "length width"]:
        x = scaled(self.embedding(ids), self.config.embedding_scale)
        if self.positions is None:
            return x
        # Padding may lie beyond the last position; nothing reads it.
        in_table = jnp.minimum(positions, self.config.max_length - 1)
        return x + self.positions(in_table).astype(x.dtype)
