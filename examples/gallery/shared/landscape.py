"""A family of proteins, a wild type with its mutants and their fitness, and a masked model.

Nothing is trained here; the script does that. A protein is a row of `LENGTH` amino acids.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import dpo_eqx as dpx

LENGTH, ACIDS = 12, 20
MASK, START = ACIDS, ACIDS + 1  # further tokens

Proteins = Int[Array, "n length"]


class Family(NamedTuple):
    """A chain: the logits of each amino acid, by its site, and by the acid on its left."""

    site: Float[Array, "length acids"]
    neighbours: Float[Array, "acids acids"]

    def log_probs(self, proteins: Proteins) -> Float[Array, " n"]:
        """The log-probability of each protein."""
        log_probs = jax.nn.log_softmax(self.logits(proteins))
        return jnp.take_along_axis(log_probs, proteins[..., None], -1)[..., 0].sum(-1)

    def logits(self, proteins: Proteins) -> Float[Array, "n length acids"]:
        """The logits of each amino acid, given the one on its left."""
        left = self.neighbours[proteins[:, :-1]]
        return self.site + jnp.pad(left, ((0, 0), (1, 0), (0, 0)))

    def draw(self, key: PRNGKeyArray, count: int) -> Proteins:
        """Natural proteins."""

        def extend(last, inputs):
            key, site = inputs
            is_first = last < 0
            left = jnp.where(is_first[:, None], 0, self.neighbours[last])
            acid = jax.random.categorical(key, site + left)
            return acid, acid

        keys = jax.random.split(key, LENGTH)
        return jax.lax.scan(extend, jnp.full(count, -1), (keys, self.site))[1].T


class Landscape(NamedTuple):
    """What evolution and an assay say about the proteins near a wild type."""

    family: Family
    wild_type: Int[Array, " length"]
    effect: Float[Array, "length acids"]  # on the assay, beside what evolution liked

    def fitness(self, proteins: Proteins) -> Float[Array, " n"]:
        """Evolution's taste and the assay's own in equal parts; 0 for the wild type.

        A difference is the log-odds of a preference in the assay.
        """
        own = jnp.take_along_axis(self.effect, proteins.T, axis=1).sum(0)
        wild = jnp.take_along_axis(self.effect, self.wild_type[:, None], axis=1).sum()
        evolution = self.family.log_probs(proteins) - self.family.log_probs(self.wild_type[None])
        return evolution / 3 + (own - wild)


def draw(key: PRNGKeyArray) -> Landscape:
    """A landscape. The wild type is the most probable of 1000 natural proteins."""
    site, neighbours, effect, natural = jax.random.split(key, 4)
    family = Family(
        1.5 * jax.random.normal(site, (LENGTH, ACIDS)),
        jax.random.normal(neighbours, (ACIDS, ACIDS)),
    )
    proteins = family.draw(natural, 1000)
    wild_type = proteins[family.log_probs(proteins).argmax()]
    return Landscape(family, wild_type, jax.random.normal(effect, (LENGTH, ACIDS)))


def mutants(wild_type: Int[Array, " length"], key: PRNGKeyArray, count: int) -> Proteins:
    """The wild type with an amino acid replaced at each of two sites."""
    for_sites, for_acids = jax.random.split(key)
    order = jax.random.uniform(for_sites, (count, LENGTH)).argsort(axis=1)
    other = jax.random.randint(for_acids, (count, LENGTH), 1, ACIDS)
    return jnp.where(order < 2, (wild_type + other) % ACIDS, wild_type)


class Masked(eqx.Module):
    """A bidirectional model: one layer of attention, which sees the whole row."""

    embedding: Float[Array, "vocab width"]
    position: Float[Array, "length width"]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, width: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 5)
        self.embedding = jax.random.normal(keys[0], (ACIDS + 2, width))
        self.position = jax.random.normal(keys[1], (LENGTH + 1, width))
        self.attention = eqx.nn.MultiheadAttention(4, width, key=keys[2])
        self.mlp = eqx.nn.MLP(width, width, 2 * width, 1, jax.nn.gelu, key=keys[3])
        self.head = eqx.nn.Linear(width, ACIDS, key=keys[4])

    def __call__(self, ids: Int[Array, " length"], *, key=None) -> Float[Array, "length acids"]:
        x = self.embedding[ids] + self.position
        x = x + self.attention(x, x, x)
        return jax.vmap(self.head)(x + jax.vmap(self.mlp)(x))


def pairs(chosen: Proteins, rejected: Proteins) -> dpx.PreferenceBatch:
    """A batch whose prompts are the start token."""
    start, *sides = (
        dpx.Tokens(x, jnp.ones(x.shape, bool))
        for x in (jnp.full((len(chosen), 1), START), chosen, rejected)
    )
    return dpx.PreferenceBatch(start, sides[0], sides[1])
