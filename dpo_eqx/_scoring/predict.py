"""A policy run on prompts and their completions, giving the prediction of each completion token.

Two ways, one result: each sequence alone for any policy, or each prompt once with all its
completions for a `FastPolicy`. Sums over tokens and everything after them are in `score.py`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._arrays.layout import Layout
from .._arrays.tokens import Tokens, as_ids
from .._head.linear import collisions_of, linear_collisions, linear_token_log_probs
from .._head.token_log_probs import token_log_probs
from .._jax.explicit_meshes import split_like
from .._jax.keys import Keys
from .._jax.partitioning import keep_rows, over_data, row_axes
from ..protocols import FastPolicy
from .policy_checks import check_is_policy, checked_hidden, checked_logits


class Logits(eqx.Module):
    """Predictions of completion tokens as logits."""

    logits: Float[Array, "pairs length vocab"]

    def log_probs(self, targets: Int[Array, "pairs length"]) -> Float[Array, "pairs length"]:
        """The log-probability of each target, in nats."""
        return token_log_probs(self.logits, targets)

    def collisions(self) -> Float[Array, "pairs length"]:
        r"""$\log\sum_v p_v^2$ of each prediction; no gradient."""
        return collisions_of(jax.lax.stop_gradient(self.logits))


class Hidden(eqx.Module):
    """Predictions of completion tokens as hidden states, from which logits are made in chunks."""

    hidden: Float[Array, "pairs length width"]
    unembedding: Float[Array, "vocab width"]
    options: dict[str, Any]

    def log_probs(self, targets: Int[Array, "pairs length"]) -> Float[Array, "pairs length"]:
        """The log-probability of each target, in nats."""
        options = dict(self.options)
        bias = options.pop("bias")

        def of_rows(rows, unembedding, bias):
            hidden, targets = rows
            return linear_token_log_probs(hidden, unembedding, targets, bias=bias, **options)

        return over_data(of_rows, (self.hidden, targets), self.unembedding, bias)

    def collisions(self) -> Float[Array, "pairs length"]:
        r"""$\log\sum_v p_v^2$ of each prediction; no gradient."""
        return linear_collisions(self.hidden, self.unembedding, **self.options)


def predict(
    policy: PyTree,
    prompt: Tokens,
    completions: Sequence[Tokens],
    *,
    keys: Keys | None,
    chunk_size: int | None,
) -> Logits | Hidden:
    """The prediction of every token of all completions, side by side in their order."""
    check_is_policy(policy)
    prompt, *completions = map(_without_padding, (prompt, *completions))
    lengths = prompt.mask.sum(axis=1, dtype=jnp.int32)
    if offers_fast_path(policy):
        hidden = _fast_hidden(policy, prompt.ids, lengths, completions, keys)
        return Hidden(hidden, policy.unembedding, head_options(policy, chunk_size))
    return Logits(_plain_logits(policy, prompt.ids, lengths, completions, keys))


def offers_fast_path(policy: PyTree) -> bool:
    """Whether `policy` offers the protocol `FastPolicy`.

    A policy with a layer that happens to be named `hidden` does not: its call has no `layout`.
    """
    return (
        isinstance(policy, FastPolicy)
        and callable(policy.hidden)
        and "layout" in inspect.signature(policy.hidden).parameters
    )


def head_options(policy: FastPolicy, chunk_size: int | None) -> dict[str, Any]:
    """What `linear_token_log_probs` takes beside the hidden states and the unembedding."""
    return {
        "bias": getattr(policy, "unembedding_bias", None),
        "softcap": getattr(policy, "softcap", None),
        "chunk_size": chunk_size,
    }


def _without_padding(tokens: Tokens) -> Tokens:
    """Ids in int32; those after the last true position of the mask become 0, whatever they were."""
    mask = jnp.asarray(tokens.mask)
    context = jax.lax.cummax(mask.astype(jnp.int32), axis=1, reverse=True) > 0
    return Tokens(jnp.where(context, as_ids(tokens.ids), 0), mask)


def _plain_logits(
    policy: PyTree,
    prompts: Int[Array | np.ndarray, "pairs prompt"],
    lengths: Int[Array, " pairs"],
    completions: Sequence[Tokens],
    keys: Keys | None,
) -> Float[Array, "pairs length vocab"]:
    """The policy called on each prompt with each completion, contiguous, under `vmap`."""
    widths = [completion.ids.shape[1] for completion in completions]
    pad = [[(0, 0), (0, max(widths) - width)] for width in widths]
    rows = jnp.stack([jnp.pad(c.ids, p) for c, p in zip(completions, pad, strict=True)], axis=1)

    def one_sequence(prompt, length, completion, key):
        row = keep_rows(jnp.concatenate([prompt, jnp.zeros_like(completion)]))
        row = jax.lax.dynamic_update_slice(row, completion, (length,))
        returned = policy(row) if key is None else policy(row, key=key)
        logits = keep_rows(checked_logits(policy, returned, row))
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
    """The policy run on each prompt with all its completions in one row, under `vmap`."""
    rows = jnp.concatenate([prompts, *(completion.ids for completion in completions)], axis=1)
    widths = tuple(completion.ids.shape[1] for completion in completions)

    def one_row(row, length, key):
        layout = Layout(length, prompts.shape[1], widths)
        returned = policy.hidden(keep_rows(row), layout, key=key)
        hidden = checked_hidden(policy, returned, row, policy.unembedding)
        return keep_rows(hidden[_predicts(layout)])

    return jax.vmap(one_row, spmd_axis_name=row_axes(rows, policy, keys))(rows, lengths, keys)


def _predicts(layout: Layout) -> Int[Array, " length"]:
    """For every completion token, the row's token whose hidden state predicts it.

    The one before it; for the first of a completion, the last real token of the prompt.
    """
    before = jnp.arange(layout.prompt_width, layout.length) - 1
    firsts, begin = [], 0
    for width in layout.completion_widths:
        firsts.append(begin)
        begin += width
    last_of_prompt = (layout.prompt_length - 1).astype(before.dtype)
    return before.at[jnp.array(firsts)].set(last_of_prompt)
