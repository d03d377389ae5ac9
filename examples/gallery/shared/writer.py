"""A policy over a language of `sentences` that offers its hidden states, as a `FastPolicy`."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import dpo_eqx as dpx


class Writer(eqx.Module):
    """A policy with one hidden layer, on the last token and the sum of all tokens so far."""

    embedding: Float[Array, "vocab width"]
    now: Float[Array, "width width"]
    so_far: Float[Array, "width width"]
    unembedding: Float[Array, "vocab width"]

    def __init__(self, vocab: int, width: int, *, key: PRNGKeyArray):
        self.embedding, self.now, self.so_far, self.unembedding = (
            jax.random.normal(own, (rows, width)) / width**0.5
            for own, rows in zip(
                jax.random.split(key, 4), (vocab, width, width, vocab), strict=True
            )
        )

    def hidden(
        self, ids: Int[Array, " length"], layout: dpx.AbstractLayout, *, key=None
    ) -> Float[Array, "length width"]:
        """The hidden state of each token, from the tokens that the layout lets it see."""
        x = self.embedding[ids]
        return jnp.tanh(x @ self.now.T + layout.mask().astype(x.dtype) @ x @ self.so_far.T)

    def __call__(self, ids: Int[Array, " length"], *, key=None) -> Float[Array, "length vocab"]:
        layout = dpx.Layout(jnp.asarray(ids.size), ids.size, ())
        return self.hidden(ids, layout) @ self.unembedding.T
