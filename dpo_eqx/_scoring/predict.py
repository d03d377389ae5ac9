"""Runs a policy on prompts and completions, and returns the prediction of each completion token.

Any policy runs on each sequence alone. A `FastPolicy` runs once on each prompt with all its
completions, and a `RecurrentPolicy` reads each prompt once, with the same result. Sums over tokens
are in `score.py`.
"""

import inspect
from collections.abc import Sequence
from functools import partial

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
from ..protocols import FastPolicy, RecurrentPolicy
from .policy_checks import (
    call_extend,
    call_policy,
    call_policy_on_batch,
    call_start,
    check_is_policy,
    checked_hidden,
)
from .rows import How, check_how, over_rows


def predict(
    policy: PyTree,
    prompt: Tokens,
    completions: Sequence[Tokens],
    *,
    keys: Keys | None,
    chunk_size: int | None,
    how: How = "vmap",
) -> AbstractPrediction:
    """The predictions of all completion tokens, with the completions concatenated in order."""
    check_how(how)
    check_is_policy(policy)
    prompt, *completions = map(without_padding, (prompt, *completions))
    lengths = prompt.mask.sum(axis=1, dtype=jnp.int32)
    if not gives_hidden(policy, how):
        return Logits(_plain_logits(policy, prompt.ids, lengths, completions, keys, how))
    run = _fast_hidden if offers_fast_path(policy) else _recurrent_hidden
    hidden = run(policy, prompt.ids, lengths, completions, keys, how)
    return Hidden(hidden, unembedding_of(policy), chunk_size)


def gives_hidden(policy: PyTree, how: How = "vmap") -> bool:
    """Whether `predict` asks `policy` for hidden states, which the library unembeds itself."""
    return how != "batch" and (offers_fast_path(policy) or offers_recurrence(policy))


def offers_fast_path(policy: PyTree) -> bool:
    """Whether `policy` offers the protocol `FastPolicy`.

    A policy does not if it only has a layer named `hidden`, whose call takes no `layout`.
    """
    return (
        isinstance(policy, FastPolicy)
        and callable(policy.hidden)
        and "layout" in inspect.signature(policy.hidden).parameters
    )


def offers_recurrence(policy: PyTree) -> bool:
    """Whether `policy` offers the protocol `RecurrentPolicy`."""
    return (
        isinstance(policy, RecurrentPolicy) and callable(policy.start) and callable(policy.extend)
    )


def unembedding_of(policy: FastPolicy | RecurrentPolicy) -> Unembedding:
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
    how: How,
) -> Float[Array, "pairs length vocab"]:
    """Calls the policy on each prompt followed directly by each completion."""
    stacked = _stacked(completions)
    if how == "batch":
        key = None if keys is None else keys[0]
        return _beside(_batch_logits(policy, prompts, lengths, stacked, key), completions)

    def one_sequence(prompt, length, completion, key):
        logits = keep_rows(call_policy(policy, _row(prompt, length, completion), key))
        return jax.lax.dynamic_slice_in_dim(logits, length - 1, completion.size)

    def one_prompt(prompt, length, completions, key):
        keys = None if key is None else jax.random.split(key, len(completions))
        own = partial(one_sequence, prompt, length)
        return over_rows(own, how)(completions, keys)  # (completions, completion, vocab)

    over_pairs = over_rows(one_prompt, how, row_axes(stacked, policy, keys))
    logits = over_pairs(prompts, lengths, stacked, split_like(keys, stacked))
    return _beside(logits, completions)


def _batch_logits(
    policy: PyTree,
    prompts: Int[Array | np.ndarray, "pairs prompt"],
    lengths: Int[Array, " pairs"],
    stacked: Int[Array, "pairs completions width"],
    key: Keys | None,
) -> Float[Array, "pairs completions width vocab"]:
    """Calls the policy once, on the rows of all prompts with all their completions."""
    over_completions = jax.vmap(_row, in_axes=(None, None, 0))
    rows = jax.vmap(over_completions)(prompts, lengths, stacked)  # (pairs, completions, length)
    logits = call_policy_on_batch(policy, rows.reshape(-1, rows.shape[-1]), key)
    logits = logits.reshape(*rows.shape, -1)

    def own(logits, length):
        return jax.lax.dynamic_slice_in_dim(logits, length - 1, stacked.shape[-1], axis=1)

    return jax.vmap(own)(logits, lengths)


def _row(
    prompt: Int[Array | np.ndarray, " prompt"],
    length: Int[Array, ""],
    completion: Int[Array, " width"],
) -> Int[Array, " both"]:
    """A prompt followed directly by a completion, and by padding."""
    # The completion overwrites the prompt's padding, because a plain policy knows no mask.
    row = keep_rows(jnp.concatenate([prompt, jnp.zeros_like(completion)]))
    return jax.lax.dynamic_update_slice(row, completion, (length,))


def _stacked(completions: Sequence[Tokens]) -> Int[Array, "pairs completions width"]:
    """All completions, padded to one width."""
    widths = [completion.ids.shape[1] for completion in completions]
    pad = [[(0, 0), (0, max(widths) - width)] for width in widths]
    return jnp.stack([jnp.pad(c.ids, p) for c, p in zip(completions, pad, strict=True)], axis=1)


def _beside(
    stacked: Float[Array, "pairs completions width last"], completions: Sequence[Tokens]
) -> Float[Array, "pairs length last"]:
    """The entries of all completions in one axis, each in its own width."""
    widths = [completion.ids.shape[1] for completion in completions]
    return jnp.concatenate([stacked[:, i, :width] for i, width in enumerate(widths)], axis=1)


def _fast_hidden(
    policy: FastPolicy,
    prompts: Int[Array | np.ndarray, "pairs prompt"],
    lengths: Int[Array, " pairs"],
    completions: Sequence[Tokens],
    keys: Keys | None,
    how: How,
) -> Float[Array, "pairs length width"]:
    """Runs the policy on each prompt with all its completions in one row.

    If the policy's `shares_prompts` is false for this length, each completion has its own row.
    """
    shares = getattr(policy, "shares_prompts", None)
    longest = prompts.shape[1] + max(completion.ids.shape[1] for completion in completions)
    if len(completions) > 1 and shares is not None and not shares(longest):
        alone = [_fast_hidden(policy, prompts, lengths, [c], keys, how) for c in completions]
        return jnp.concatenate(alone, axis=1)
    rows = jnp.concatenate([prompts, *(completion.ids for completion in completions)], axis=1)
    widths = tuple(completion.ids.shape[1] for completion in completions)
    sizes = jnp.stack([sizes_of(completion) for completion in completions], axis=1)

    def one_row(row, length, sizes, key):
        layout = Layout(length, prompts.shape[1], widths, sizes)
        returned = policy.hidden(keep_rows(row), layout, key=key)
        hidden = checked_hidden(policy, returned, row, policy.unembedding)  # (length, width)
        return keep_rows(hidden[layout.predicts[layout.prompt_width :]])

    over_pairs = over_rows(one_row, how, row_axes(rows, policy, keys))
    return over_pairs(rows, lengths, sizes, keys)


def _recurrent_hidden(
    policy: RecurrentPolicy,
    prompts: Int[Array | np.ndarray, "pairs prompt"],
    lengths: Int[Array, " pairs"],
    completions: Sequence[Tokens],
    keys: Keys | None,
    how: How,
) -> Float[Array, "pairs length width"]:
    """Reads each prompt once, and each completion from the state after its prompt."""
    stacked = _stacked(completions)

    def one_prompt(prompt, length, completions, key):
        keys = None if key is None else jax.random.split(key, 1 + len(completions))
        first, others = (None, None) if keys is None else (keys[0], keys[1:])
        state, before = call_start(policy, keep_rows(prompt), length, first)

        def one_completion(completion, key):
            _, hidden = call_extend(policy, state, keep_rows(completion), key)
            # Each token is predicted by the token before it, and the first one by the prompt.
            return keep_rows(jnp.concatenate([before[None], hidden])[:-1])

        over_completions = over_rows(one_completion, how)
        return over_completions(completions, others)  # (completions, completion, width)

    over_pairs = over_rows(one_prompt, how, row_axes(stacked, policy, keys))
    return _beside(over_pairs(prompts, lengths, stacked, keys), completions)
