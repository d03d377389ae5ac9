"""Samples completions from a policy, token by token, for a batch of prompts.

A `Transformer` caches keys and values. Any other policy runs on the whole row for each token. So
does a `Transformer` in rows so long that its rotary embeddings depend on their length.
"""

import operator
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ..._arrays.batches import is_concrete
from ..._arrays.layout import Layout
from ..._arrays.tokens import Tokens, as_ids
from ..._jax.describe import described
from ..._jax.explicit_meshes import automatic
from ..._jax.keys import check_key
from ..._jax.scalars import Number
from ..._scoring.policy_checks import check_is_policy, checked_logits
from .attention import attend, attend_by_layout, masks, visible
from .sample import choose
from .transformer import Transformer


@partial(automatic, like=1)
def generate(
    policy: PyTree,
    prompt: Tokens,
    *,
    max_new_tokens: int | np.integer,
    temperature: Number = 1.0,
    top_k: int | np.integer | None = None,
    top_p: Number | None = None,
    key: PRNGKeyArray | None = None,
    eos: int | np.integer | Sequence[int | np.integer] | Array | np.ndarray | None = None,
) -> Tokens:
    """Samples a completion for each prompt.

    ```python
    answers = models.generate(policy, prompt, max_new_tokens=64, temperature=0, eos=2)
    ```

    The function is jitted; shapes, `top_k`, `eos` and whether `temperature` is 0 are static. It
    stops as soon as all rows have ended. Temperature applies before top-k, and top-k before top-p.

    **Arguments:**

    - `policy`: a `Transformer`, with adapters or without, or any causal callable from ids of shape
        `(length,)` to logits of shape `(length, vocab)`.
    - `prompt`: the prompts, padded on the right. Shape `(batch, length)`.
    - `max_new_tokens`: the largest number of tokens in a completion, and the width of the result.
    - `temperature`: the logits are divided by it; 0 takes the likeliest token and needs no key.
    - `top_k`: sample from the `top_k` likeliest tokens (default: all).
    - `top_p`: sample from the fewest tokens whose probabilities sum to `top_p` (default: all).
    - `key`: the random key; each row and each token gets a key derived from it.
    - `eos`: the id of the token that ends a completion, or several ids.

    **Returns:**

    Only the new tokens. The mask is true up to and including the end token. Shape
    `(batch, max_new_tokens)`.

    **Raises:**

    `ValueError` if an argument is out of range, if a key is missing, or if positions are learned
    and are fewer than the tokens of a prompt and its completion.
    """
    check_is_policy(policy)
    _check_prompt(prompt)
    is_greedy = isinstance(temperature, Real) and temperature == 0
    _check(max_new_tokens, temperature, top_k, top_p, None if is_greedy else key, is_greedy)
    if isinstance(policy, Transformer):
        policy.check_length(_longest(prompt) + int(max_new_tokens))
    prompt = Tokens(as_ids(prompt.ids), jnp.asarray(prompt.mask))
    sampling = None if is_greedy else (jnp.asarray(temperature, jnp.float32), top_p)
    key, top_k = None if is_greedy else key, None if top_k is None else int(top_k)
    return _generate(policy, prompt, key, sampling, int(max_new_tokens), top_k, _ends(eos))


@eqx.filter_jit
def _generate(
    policy: PyTree,
    prompt: Tokens,
    key: PRNGKeyArray | None,
    sampling: Any,
    steps: int,
    top_k: int | None,
    ends: tuple[int, ...],
) -> Tokens:
    temperature, top_p = (1.0, None) if sampling is None else sampling
    longest = prompt.ids.shape[1] + steps
    caches = isinstance(policy, Transformer) and policy.shares_prompts(longest)
    reader = _Cached(policy, steps) if caches else _Uncached(policy, steps)
    rows = prompt.ids.shape[0]
    lengths = prompt.mask.sum(axis=1)
    state, logits = jax.vmap(reader.start)(jnp.asarray(prompt.ids), lengths)

    def pick(step, logits):
        keys = None if key is None else jax.random.split(jax.random.fold_in(key, step), rows)

        def one(logits, key):
            return choose(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)

        return jax.vmap(one)(logits, keys).astype(jnp.int32)

    def going(carry):
        step, _, _, done, _, _ = carry
        return (step < steps) & ~done.all()

    # All rows step together: a row that has ended writes masked-out tokens until the last one ends.
    def advance(carry):
        step, state, logits, done, ids, mask = carry
        token = jnp.where(done, ends[0] if ends else 0, pick(step, logits))
        ids, mask = ids.at[:, step].set(token), mask.at[:, step].set(~done)
        done = done | _is_end(token, ends)
        read = jax.vmap(reader.advance, in_axes=(0, 0, 0, None))
        state, logits = read(state, token, lengths, step)
        return step + 1, state, logits, done, ids, mask

    ids = jnp.full((rows, steps), ends[0] if ends else 0, jnp.int32)
    mask, done = jnp.zeros((rows, steps), bool), jnp.zeros(rows, bool)
    *_, ids, mask = jax.lax.while_loop(
        going, advance, (jnp.zeros_like(lengths[0]), state, logits, done, ids, mask)
    )
    return Tokens(ids, mask)


def _is_end(token: Int[Array, " batch"], ends: tuple[int, ...]) -> Bool[Array, " batch"]:
    is_end = jnp.zeros(token.shape, bool)
    for end in ends:
        is_end = is_end | (token == end)
    return is_end


class _Cached(eqx.Module):
    """Reads one row and caches keys and values: first the prompt's, then the new tokens'.

    The prompt's padding lies in between and is masked, as in a `Layout` with one completion.
    """

    policy: Transformer
    steps: int = eqx.field(static=True)

    def start(self, ids: Int[Array, " prompt"], length: Int[Array, ""]):
        """Reads the prompt; returns the cache, and the logits of the first new token."""
        policy, config = self.policy, self.policy.config
        layout = Layout(length, ids.size, ())

        def attend_and_keep(query, key, value, masks, cache, rng):
            output = attend_by_layout(layout, query, key, value, masks, config=config, rng=rng)
            return output, jax.tree.map(self._with_room, (key, value))

        hidden, cache = policy.run(
            ids, layout.positions, attend_and_keep, lambda window: masks(layout, window)
        )
        return cache, policy.unembed(hidden[length - 1][None])[0]

    def advance(self, cache, token: Int[Array, ""], length: Int[Array, ""], step: Int[Array, ""]):
        """Reads one new token; returns the updated cache, and the logits of the next token."""
        policy = self.policy
        slots = cache[0].shape[1]
        layout = Layout(length, slots - self.steps, (self.steps,))
        # The position counts real tokens alone, while `slot` below counts the padding too.
        position = (length + step)[None].astype(layout.positions.dtype)
        real = layout.segments >= 0

        def mask_of(window):
            return visible(position, layout.positions, window) & real[None, :]

        def attend_cached(query, key, value, mask, cache, rng):
            slot = layout.prompt_width + step
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=0)
                for old, new in zip(cache, (key, value), strict=True)
            )
            keys, values = (x[None] for x in cache)
            return attend(query[None], keys, values, mask, config=policy.config)[0], cache

        hidden, cache = policy.run(token[None], position, attend_cached, mask_of, cache=cache)
        return cache, policy.unembed(hidden)[0]

    def _with_room(self, x: Float[Array, "prompt heads head_width"]) -> Array:
        return jnp.concatenate([x, jnp.zeros((self.steps, *x.shape[1:]), x.dtype)])


class _Uncached(eqx.Module):
    """Runs any policy on the whole row for each token; its state is the row."""

    policy: PyTree
    steps: int = eqx.field(static=True)

    def start(self, ids: Int[Array, " prompt"], length: Int[Array, ""]):
        """The row with room for the new tokens, and the logits of the first of them."""
        row = jnp.concatenate([ids, jnp.zeros(self.steps, ids.dtype)])
        return row, self._logits(row, length)[length - 1]

    def advance(self, row, token: Int[Array, ""], length: Int[Array, ""], step: Int[Array, ""]):
        """Appends one new token; returns the row, and the logits of the next token."""
        row = row.at[length + step].set(token)
        return row, self._logits(row, length + step + 1)[length + step]

    def _logits(
        self, row: Int[Array, " length"], tokens: Int[Array, ""]
    ) -> Float[Array, "length vocab"]:
        """The logits of a row of which `tokens` are real."""
        if isinstance(self.policy, Transformer):
            hidden = self.policy.hidden(row, Layout(tokens, row.size, ()))
            return self.policy.unembed(hidden)
        return checked_logits(self.policy, self.policy(row), row)


def _longest(prompt: Tokens) -> int:
    """The tokens of the longest prompt; under a transformation, the width, which bounds them."""
    if not is_concrete(prompt.mask) or not len(prompt.mask):
        return prompt.ids.shape[1]
    return int(np.asarray(prompt.mask.sum(axis=1)).max())


def _ends(eos: Any) -> tuple[int, ...]:
    """The ids that end a completion."""
    several = () if eos is None else (eos,) if np.ndim(eos) == 0 else tuple(eos)
    try:
        return tuple(operator.index(end) for end in several)
    except TypeError as error:
        raise ValueError(
            "`eos` must be the id of the token that ends a completion, or several ids; got "
            f"{eos!r}."
        ) from error


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, Tokens):
        raise ValueError(
            "`prompt` must be `dpx.Tokens(ids, mask)` of shape `(batch, length)`; got "
            f"{described(prompt)}. A tokenizer turns text into `ids`; for one text, give "
            "`dpx.Tokens(np.array([ids]), np.ones((1, len(ids)), bool))`."
        )
    if prompt.ids.ndim != 2:
        raise ValueError(f"`prompt` must have shape `(batch, length)`; got {prompt.ids.shape}.")


def _check(max_new_tokens, temperature, top_k, top_p, key, is_greedy) -> None:
    if not max_new_tokens > 0:
        raise ValueError(f"`max_new_tokens` must be positive; got {max_new_tokens}.")
    if isinstance(temperature, Real) and not float(temperature) >= 0:
        raise ValueError(f"`temperature` must not be negative; got {temperature}.")
    if top_k is not None and not top_k > 0:
        raise ValueError(f"`top_k` must be positive; got {top_k}.")
    if isinstance(top_p, Real) and not 0 < float(top_p) <= 1:
        raise ValueError(f"`top_p` must be in (0, 1]; got {top_p}.")
    if is_greedy:
        return
    if key is None:
        raise ValueError("`key` is required to sample tokens; give one, or `temperature=0`.")
    check_key(key)
