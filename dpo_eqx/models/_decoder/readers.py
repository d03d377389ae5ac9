"""How each kind of policy reads a prompt, and then one new token after another, in one row.

A `Transformer` keeps the keys and values of the prompt, which all samples share, apart from those
of each sample. The states of its recurrent layers begin as the prompt's in each sample, and so does
the state of a `RecurrentPolicy`. Any other policy runs on the whole row for each token. So does a
`Transformer` in rows so long that its rotary embeddings depend on their length.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..._arrays.layout import Layout
from ..._scoring.policy_checks import call_extend, call_start, check_keeps_shapes, checked_logits
from ..._scoring.predict import offers_recurrence, unembedding_of
from ...protocols import RecurrentPolicy
from .apart import Apart, caches_apart
from .attention import attend_parts, visible
from .blocks import Caches
from .incremental import read_prompt
from .transformer import Transformer

# The axis of tokens in keys and values. It comes after that of heads: the scan over the layers and
# the products of each head then read the cache as it lies.
TOKENS = -2


def reader_of(policy: PyTree, longest: int) -> "Cached | Recurrent | Uncached":
    """The reader of a policy, in rows of at most `longest` tokens."""
    if isinstance(policy, Transformer):
        return Cached(policy) if policy.shares_prompts(longest) else Uncached(policy)
    return Recurrent(policy) if offers_recurrence(policy) else Uncached(policy)


class Cached(eqx.Module):
    """Reads one row with a cache: keys and values of the prompt and of the new tokens, and states.

    All samples share the keys and values of the prompt; each has its own of the new tokens, and its
    own states of recurrent layers.
    """

    policy: Transformer
    # The weights of each layer; `None` if they are read from the stack.
    apart: Apart | None = None

    @property
    def lead(self) -> int:
        """The axis of rows in the states, which comes after that of layers if they are stacked."""
        return 1 if self.apart is None else 0

    def start(self, ids: Int[Array, " prompt"], length: Int[Array, ""]):
        """Reads a prompt: its cache, an empty one for new tokens, and the logits of the first."""
        hidden, caches = read_prompt(self.policy, ids, length)
        by_head = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), caches.attention)
        caches = caches._replace(attention=by_head)
        own = caches._replace(attention=jax.tree.map(lambda x: x[:, :, :0], by_head))
        shared = caches._replace(recurrence=None)
        return shared, own, self.policy.unembed(hidden[length - 1][None])[0]

    def taken_apart(self, shared, own) -> tuple["Cached", Any, Any]:
        """A reader of layers that are not stacked, and the states of all rows for it."""
        shared, own = (caches_apart(caches, self.policy) for caches in (shared, own))
        return Cached(self.policy, Apart.of(self.policy)), shared, own

    def advance(self, shared, own, token: Int[Array, ""], length: Int[Array, ""], step):
        """Reads the new token number `step`: what to write, and the logits of the next token."""
        policy, config = self.policy, self.policy.config
        prompt, new = (_places(x).astype(length.dtype) for x in (shared, own))
        # The position counts real tokens, and not the padding of the prompt.
        position = (length + step)[None]

        def masks_of(window):
            on_prompt = visible(position, prompt, window) & (prompt < length)[None]
            return on_prompt, visible(position, length + new, window) & (new < step)[None]

        def attend_cached(query, key, value, sinks, masks, caches, rng):
            (shared, own), (on_prompt, on_own) = caches, masks
            # The token itself is not in the cache yet: a layer returns what is to be written, and
            # one write for all layers follows.
            key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
            parts = (*shared, on_prompt), (*own, on_own), (key, value, jnp.ones((1, 1), bool))
            return attend_parts(query, parts, sinks=sinks, config=config), (key, value)

        run = partial(policy.run, token[None], position, attend_cached, masks_of)
        if self.apart is None:
            hidden, written = run(caches=_paired(shared, own))
            return written, policy.unembed(hidden)[0]
        apart, caches = self.apart.for_use(), map(_paired, shared, own)
        hidden, written = run(layers=list(zip(apart.layers, caches, strict=True)))
        return written, apart.unembedding.logits(hidden)[0]

    def grow(self, own, width: int):
        """The states of all samples with room for `width` new tokens."""
        return _map_attention(lambda x: _padded(x, TOKENS, width), own)

    def write(self, own, new, place: Int[Array, ""]):
        """The states of all samples with the new token at a place, from `new` of `advance`."""
        # Not in `advance`: a `vmap` of the update would copy the whole cache.
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=TOKENS)
        return _map_attention(write, own, new)


def _map_attention(function: Callable[..., Array], *states: PyTree) -> PyTree:
    """Maps a function over keys and values; the states of recurrent layers are the last ones."""

    def of_caches(*caches):
        attention = jax.tree.map(function, *(each.attention for each in caches))
        return caches[-1]._replace(attention=attention)

    return jax.tree.map(of_caches, *states, is_leaf=lambda x: isinstance(x, Caches))


def _padded(x: Array, axis: int, width: int) -> Array:
    """`x` with zeros behind it along an axis, up to a width."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, width - x.shape[axis])
    return jnp.pad(x, padding)


def _paired(shared: Caches, own: Caches) -> Caches:
    """What layers read for a new token: the cache of the prompt and their own, and their states."""
    return Caches((shared.attention, own.attention), own.recurrence)


def _places(caches: Caches | tuple[Caches, ...]) -> Int[Array, " length"]:
    """The places of the tokens in a cache of keys and values; none if no layer has attention."""
    each = [caches] if isinstance(caches, Caches) else caches
    leaves = jax.tree.leaves([own.attention for own in each])
    return jnp.arange(leaves[0].shape[TOKENS] if leaves else 0)


class Recurrent(eqx.Module):
    """Reads one row by a state of fixed shapes; samples share nothing but their first state."""

    policy: RecurrentPolicy
    lead: int = eqx.field(static=True, default=0)

    def start(self, ids: Int[Array, " prompt"], length: Int[Array, ""]):
        """Reads a prompt: nothing to share, its state, and the logits of the first new token."""
        state, hidden = call_start(self.policy, ids, length, None)
        return None, jax.tree.map(jnp.asarray, state), self._logits(hidden[None])

    def advance(self, shared, own, token: Int[Array, ""], length: Int[Array, ""], step):
        """Reads the new token number `step`: the state, and the logits of the next token."""
        state, hidden = call_extend(self.policy, own, token[None], None)
        state = jax.tree.map(jnp.asarray, state)
        check_keeps_shapes(self.policy, own, state)
        return state, self._logits(hidden)

    def grow(self, own, width: int):
        """The states as they are: their shapes are fixed."""
        return own

    def write(self, own, new, place: Int[Array, ""]):
        """The new states."""
        return new

    def _logits(self, hidden: Float[Array, "1 width"]) -> Float[Array, " vocab"]:
        return unembedding_of(self.policy).logits(hidden)[0]


class Uncached(eqx.Module):
    """Runs any policy on the whole row for each token; its state is the row."""

    policy: PyTree
    lead: int = eqx.field(static=True, default=0)

    def start(self, ids: Int[Array, " prompt"], length: Int[Array, ""]):
        """The prompt, no new tokens, and the logits of the first of them."""
        return ids, ids[:0], self._logits(ids, length)[length - 1]

    def advance(self, shared, own, token: Int[Array, ""], length: Int[Array, ""], step):
        """Writes the new token number `step`: the new tokens, and the logits of the next one."""
        own = own.at[step].set(token)
        row = jnp.concatenate([shared, jnp.zeros_like(own)])
        # Behind the real tokens of the prompt, over its padding.
        row = jax.lax.dynamic_update_slice_in_dim(row, own, length, axis=0)
        return own, self._logits(row, length + step + 1)[length + step]

    def grow(self, own, width: int):
        """The new tokens of all samples with room for `width`."""
        return _padded(own, -1, width)

    def write(self, own, new, place: Int[Array, ""]):
        """The new tokens, among which `advance` wrote the last one."""
        return new

    def _logits(
        self, row: Int[Array, " length"], tokens: Int[Array, ""]
    ) -> Float[Array, "length vocab"]:
        """The logits of a row of which `tokens` are real."""
        if isinstance(self.policy, Transformer):
            hidden = self.policy.hidden(row, Layout(tokens, row.size, ()))
            return self.policy.unembed(hidden)
        return checked_logits(self.policy, self.policy(row), row)


Reader = Cached | Recurrent | Uncached
