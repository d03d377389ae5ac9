"""Runs a policy on prompts and completions, and returns the prediction of each completion token.

Any policy runs on each sequence alone; a `FastPolicy` runs once on each prompt with all its
completions, with the same result. Sums over tokens are in `score.py`.
"""

import inspect
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._arrays.layout import Layout
from .._arrays.tokens import Tokens, as_ids
from .._head.predictions import AbstractPrediction, Hidden, Logits
from .._head.tiles import Unembedding
from .._jax.explicit_meshes import split_like
from .._jax.keys import Keys
from .._jax.partitioning import keep_rows, row_axes
from ..protocols import FastPolicy
from .policy_checks import call_policy, check_is_policy, checked_hidden


def predict(
    policy: PyTree,
    prompt: Tokens,
    completions: Sequence[Tokens],
    *,
    keys: Keys | None,
    chunk_size: int | None,
) -> AbstractPrediction:
    """The predictions of all completion tokens, with the completions concatenated in order."""
    check_is_policy(policy)
    prompt, *completions = map(without_padding, (prompt, *completions))
    lengths = prompt.mask.sum(axis=1, dtype=jnp.int32)
    if offers_fast_path(policy):
        hidden = _fast_hidden(policy, prompt.ids, lengths, completions, keys)
        return Hidden(hidden, unembedding_of(policy), chunk_size)
    return Logits(_plain_logits(policy, prompt.ids, lengths, completions, keys))


def offers_fast_path(policy: PyTree) -> bool:
    """Whether `policy` offers the protocol `FastPolicy`.

    A policy does not if it only has a layer named `hidden`, whose call takes no `layout`.
    """
    return (
        isinstance(policy, FastPolicy)
        and callable(policy.hidden)
        and "layout" in inspect.signature(policy.hidden).parameters
    )


def unembedding_of(policy: FastPolicy) -> Unembedding:
    """The unembedding of `policy`, with its optional bias and soft cap."""
    bias, softcap = getattr(policy, "unembedding_bias", None), getattr(policy, "softcap", None)
    return Unembedding(policy.unembedding, bias, softcap)


def without_padding(tokens: Tokens) -> Tokens:
    """Ids in int32; any id after the last true position of the mask becomes 0."""
    mask = jnp.asarray(tokens.mask)
    context = jax.lax.cummax(mask.astype(jnp.int32), axis=1, reverse=True) > 0
    return Tokens(jnp.where(context, as_ids(tokens.ids), 0), mask)


def sizes_of(completion: Tokens) -> Int[Array, "*batch"]:
    """The number of tokens of each completion: the last scored one and all before it."""
    places = jnp.arange(1, completion.mask.shape[-1] + 1, dtype=jnp.int32)
    return jnp.where(completion.mask, places, 0).max(axis=-1, initial=0)


def _plain_logits(
    policy: PyTree,
    prompts: Int[Array | np.ndarray, "pairs prompt"],
    lengths: Int[Array, " pairs"],
    completions: Sequence[Tokens],
    keys: Keys | None,
) -> Float[Array, "pairs length vocab"]:
    """Calls the policy on each prompt followed directly by each completion, under `vmap`."""
    widths = [completion.ids.shape[1] for completion in completions]
    pad = [[(0, 0), (0, max(widths) - width)] for width in widths]
    rows = jnp.stack([jnp.pad(c.ids, p) for c, p in zip(completions, pad, strict=True)], axis=1)

    def one_sequence(prompt, length, completion, key):
        # The completion overwrites the prompt's padding, because a plain policy knows no mask.
        row = keep_rows(jnp.concatenate([prompt, jnp.zeros_like(completion)]))
        row = jax.lax.dynamic_update_slice(row, completion, (length,))
        logits = keep_rows(call_policy(policy, row, key))  # (prompt + completion, vocab)
        return jax.lax.dynamic_slice_in_dim(logits, length - 1, completion.size)

    def one_prompt(prompt, length, completions, key):
        keys = None if key is None else jax.random.split(key, len(completions))
        return jax.vmap(one_sequence, in_axes=(None, None, 0, 0))(prompt, length, completions, keys)

    over_pairs = jax.vmap(one_prompt, spmd_axis_name=row_axes(rows, policy, keys))
    logits = over_pairs(prompts, lengths, rows, split_like(keys, rows))
    return jnp.concatenate([logits[:, i, :width] for i, width in enumerate(widths)], axis=1)


def _fast_hidden(
    policy: FastPolicy,
    prompts: Int[Array | np.ndarray, "pairs prompt"],
    lengths: Int[Array, " pairs"],
    completions: Sequence[Tokens],
    keys: Keys | None,
) -> Float[Array, "pairs length width"]:
    """Runs the policy on each prompt with all its completions in one row, under `vmap`.

    If the policy's `shares_prompts` is false for this length, each completion has its own row.
    """
    shares = getattr(policy, "shares_prompts", None)
    longest = prompts.shape[1] + max(completion.ids.shape[1] for completion in completions)
    if len(completions) > 1 and shares is not None and not shares(longest):
        alone = [_fast_hidden(policy, prompts, lengths, [c], keys) for c in completions]
        return jnp.concatenate(alone, axis=1)
    rows = jnp.concatenate([prompts, *(completion.ids for completion in completions)], axis=1)
    widths = tuple(completion.ids.shape[1] for completion in completions)
    sizes = jnp.stack([sizes_of(completion) for completion in completions], axis=1)

    def one_row(row, length, sizes, key):
        layout = Layout(length, prompts.shape[1], widths, sizes)
        returned = policy.hidden(keep_rows(row), layout, key=key)
        hidden = checked_hidden(policy, returned, row, policy.unembedding)  # (length, width)
        return keep_rows(hidden[layout.predicts[layout.prompt_width :]])

    over_rows = jax.vmap(one_row, spmd_axis_name=row_axes(rows, policy, keys))
    return over_rows(rows, lengths, sizes, keys)
