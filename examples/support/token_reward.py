"""The gold reward of `grammar.py` as a JAX function of tokens, for a jitted round of training.

It is not another reward: it gives each row of tokens the reward of its text.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import dpo_eqx as dpx

from . import grammar
from .tasks import WORDS


def _ids(word: str) -> int:
    return WORDS.ids[word.encode()]


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kind of each thing, the worth of adjectives by kind, and the factor of each adverb.

    NaN stands for all other words, which the grammar does not allow there.
    """
    kinds = np.zeros(WORDS.size, np.int32)
    worths = np.full((len(grammar.THINGS), WORDS.size), np.nan, np.float32)
    factors = np.full(WORDS.size, np.nan, np.float32)
    for number, (kind, things) in enumerate(grammar.THINGS.items()):
        kinds[[_ids(f" {thing}") for thing in things]] = number
        for word, worth in grammar.ADJECTIVES[kind].items():
            worths[number, _ids(f" {word}")] = worth
    for adverb, factor in grammar.ADVERBS.items():
        if adverb:
            factors[_ids(f" {adverb.strip()}")] = factor
    return kinds, worths, factors


KINDS, WORTHS, FACTORS = _tables()
WAS, AND, STOP = _ids(" was"), _ids(" and"), _ids(".")


def gold_reward(prompt: dpx.Tokens, completion: dpx.Tokens) -> Float[Array, "prompts samples"]:
    """The gold reward of each sample, as `grammar.gold_reward` gives it to the text.

    **Arguments:**

    - `prompt`: prompts of the grammar. Shape `(prompts, length)`.
    - `completion`: completions of them. Shape `(prompts, samples, length)`.
    """
    last = prompt.mask.sum(axis=1) - 1
    things = jnp.take_along_axis(jnp.asarray(prompt.ids), last[:, None], axis=1)[:, 0]
    # Behind the mask only the end token, which starts no clause and ends every completion.
    ids = jnp.where(completion.mask, completion.ids, WORDS.end)
    of_prompt = jax.vmap(_worth, in_axes=(None, 0))
    worth = jax.vmap(of_prompt)(jnp.asarray(KINDS)[things], ids)
    return jnp.where(jnp.isnan(worth), grammar.WORST, worth)


def _worth(kind: Int[Array, ""], ids: Int[Array, " length"]) -> Float[Array, ""]:
    """The worth of one completion, or NaN if the grammar does not allow it."""
    # Room for a second clause, and for what follows it, behind any first one.
    ids = jnp.pad(ids, (0, 8), constant_values=WORDS.end)
    one, end = _clause(kind, ids, jnp.asarray(1))
    other, end_of_two = _clause(kind, ids, end + 1)
    is_two = ids[end] == AND
    worth, end = jnp.where(is_two, one + other, one), jnp.where(is_two, end_of_two, end)
    is_whole = (ids[0] == WAS) & (ids[end] == STOP) & (ids[end + 1] == WORDS.end)
    return jnp.where(is_whole, worth, jnp.nan)


def _clause(
    kind: Int[Array, ""], ids: Int[Array, " length"], start: Int[Array, ""]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The worth of the clause at `start`, NaN if there is none, and the place behind it."""
    factor = jnp.asarray(FACTORS)[ids[start]]
    has_adverb = ~jnp.isnan(factor)
    place = jnp.where(has_adverb, start + 1, start)
    worth = jnp.asarray(WORTHS)[kind, ids[place]]
    return worth * jnp.where(has_adverb, factor, 1), place + 1
