"""The gated delta rule in chunks against the same rule token by token, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx.models._decoder.delta_rule import gated_delta_rule
from dpo_eqx.models._decoder.links import Links, links_of, one_sequence
from dpo_eqx.models._decoder.short_conv import Filter
from dpo_eqx.models._decoder.unit_triangular import solve_unit_lower

from ..policies import assert_close

LENGTH, HEADS, KEY, VALUE, CHUNK, KERNEL = 22, 2, 3, 4, 4, 3
# Rows of `LENGTH` tokens: the width of a prompt and of its completions, and the prompt's length.
PADDED = [(7, (6, 9), length) for length in (1, 3, 4, 7)]
# The tokens of each prompt and both its completions.
PACKED = [
    [(5, 6, 7), (1, 1, 1)],
    [(4, 4, 4), (4, 4, 0)],
    [(1, 0, 9), (2, 3, 4)],
    [(12, 8, 2), (0, 0, 0)],
    [(3, 2, 5), (0, 0, 0)],
]


def parents_of_padded(width, completions, length):
    """The token before each token, or -1; `None` in padding. Written from the row itself."""
    parents = [place - 1 if place < length else None for place in range(width)]
    for completion in completions:
        start = len(parents)
        parents += [length - 1, *range(start, start + completion - 1)]
    return parents


def parents_of_packed(lengths):
    parents = []
    for prompt, *completions in lengths:
        start = len(parents)
        parents += [place - 1 if place > start else -1 for place in range(start, start + prompt)]
        for completion in completions:
            if completion:
                first = len(parents)
                parents += [start + prompt - 1, *range(first, first + completion - 1)]
    return parents + [None] * (LENGTH - len(parents))


def rows():
    """The links of rows, and the parents of their tokens."""
    for width, completions, length in PADDED:
        layout = dpx.Layout(length, width, completions)
        yield links_of(layout), parents_of_padded(width, completions, length)
    for lengths in PACKED:
        layout = dpx.PackedLayout(np.array(lengths), LENGTH, LENGTH, LENGTH)
        yield links_of(layout), parents_of_packed(lengths)


ROWS = list(rows())


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, LENGTH, HEADS, KEY))
    value = rng.normal(size=(LENGTH, HEADS, VALUE))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    log_decay = -rng.exponential(size=(LENGTH, HEADS))
    log_decay[5] = -200.0  # a token that forgets everything
    rate = rng.uniform(size=(LENGTH, HEADS))
    state = rng.normal(size=(HEADS, KEY, VALUE))
    return tuple(jnp.asarray(x) for x in (query, key, value, log_decay, rate)), jnp.asarray(state)


def token_by_token(arrays, parents, state):
    """What each token reads; the state after it. The definition, for a tree of tokens."""

    def step(states, token):
        query, key, value, log_decay, rate, parent, place = token
        before = jnp.exp(log_decay)[:, None, None] * states[parent]
        error = value - jnp.einsum("hkv,hk->hv", before, key)
        after = before + rate[:, None, None] * jnp.einsum("hk,hv->hkv", key, error)
        return states.at[place].set(after), jnp.einsum("hkv,hk->hv", after, query)

    # The last entry is the state before the row: the parent -1.
    start = jnp.zeros((LENGTH + 1, *state.shape)).at[-1].set(state)
    places = jnp.arange(LENGTH)
    states, output = jax.lax.scan(step, start, (*arrays, parents, places))
    return output, states


@jax.jit
def wanted(arrays, state, parents, slopes):
    def total(arrays, state):
        output, states = token_by_token(arrays, parents, state)
        return (slopes * output).sum(), (output, states)

    return jax.value_and_grad(total, (0, 1), has_aux=True)(arrays, state)


@eqx.filter_jit
def chunked(arrays, state, links, slopes, chunk=CHUNK):
    def total(arrays, state):
        output, after = gated_delta_rule(*arrays, links, state, chunk=chunk)
        return (slopes * output).sum(), (output, after)

    return jax.value_and_grad(total, (0, 1), has_aux=True)(arrays, state)


def assert_near(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(one - other).max() < 1e-10


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_equals_the_rule_token_by_token(number):
    """In value and gradient, whatever a chunk begins or ends with, and with padding between."""
    links, parents = ROWS[number]
    real = np.array([parent is not None for parent in parents])
    arrays, state = inputs()
    if number >= len(PADDED):
        state = 0 * state  # sequences of a packed row begin with nothing
    slopes = np.random.default_rng(1).normal(size=(LENGTH, HEADS, VALUE)) * real[:, None, None]
    places = np.array([-1 if parent is None else parent for parent in parents])
    (_, (want, states)), want_slopes = wanted(arrays, state, places, slopes)
    (_, (got, after)), got_slopes = chunked(arrays, state, links, slopes)
    assert_near(got[real], want[real])
    assert_near(after, states[np.flatnonzero(real)[-1]])
    if number >= len(PADDED):
        got_slopes, want_slopes = got_slopes[0], want_slopes[0]
    assert_near(got_slopes, want_slopes)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    arrays, state = inputs()
    slopes = np.ones((LENGTH, HEADS, VALUE))
    links = one_sequence(LENGTH)
    places = np.arange(LENGTH) - 1
    (_, (want, states)), want_slopes = wanted(arrays, state, places, slopes)
    (_, (got, after)), got_slopes = chunked(arrays, state, links, slopes, chunk)
    assert_near((got, after, got_slopes), (want, states[-2], want_slopes))


def test_nothing_overflows():
    """Decays to nothing, and keys that repeat with a rate of 1, for which a series diverges."""
    (query, key, value, log_decay, rate), state = inputs()
    arrays = query, jnp.broadcast_to(key[:1], key.shape), value, 0 * log_decay - 500, 0 * rate + 1
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    slopes = jnp.ones((LENGTH, HEADS, VALUE), jnp.float32)
    result = chunked(arrays, state.astype(jnp.float32), ROWS[4][0], slopes, 64)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("size", [1, 5, 64])
def test_triangular_systems(size):
    """Also of keys that repeat, for which powers of the matrix are as large as 1e17."""
    rng = np.random.default_rng(0)
    key, known = rng.normal(size=(2, 3, size, 8)), rng.normal(size=(2, 3, size, 4))
    key[0] = key[0, :, :1]
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    rate = rng.uniform(size=(2, 3, size, 1))
    rate[0] = 1
    matrix = rate * (key @ np.swapaxes(key, -1, -2))
    below = np.tril(matrix, -1) + np.eye(size)
    got, pull = jax.vjp(jax.jit(solve_unit_lower), matrix, known)
    want = np.linalg.solve(below, known)
    assert_close(got, want, 1e-12)
    slopes = rng.normal(size=got.shape)
    transposed = np.linalg.solve(np.swapaxes(below, -1, -2), slopes)
    of_matrix = np.tril(-transposed @ np.swapaxes(want, -1, -2), -1)
    assert_close(pull(slopes), (of_matrix, transposed), 1e-12)


def test_a_cpu_is_not_given_functions_that_wait_for_its_own_threads():
    """Batched functions of LAPACK never return if they run in all threads of XLA's pool."""
    arrays, state = inputs()
    slopes = np.ones((LENGTH, HEADS, VALUE))
    program = chunked.lower(arrays, state, one_sequence(LENGTH), slopes)
    assert "lapack" not in program.as_text()


@eqx.filter_jit
def filtered(filter, x, links: Links, history):
    return filter(x, links, history)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_filter_sees_the_tokens_before_its_own(number):
    links, parents = ROWS[number]
    rng = np.random.default_rng(2)
    x, history = rng.normal(size=(LENGTH, 5)), rng.normal(size=(KERNEL - 1, 5))
    if number >= len(PADDED):
        history = 0 * history
    filter = Filter(5, KERNEL, bias=True, key=jax.random.key(0))
    filter = eqx.tree_at(lambda f: f.bias, filter, jnp.arange(5.0))
    got, after = map(np.asarray, filtered(filter, x, links, history))
    weight = np.asarray(filter.weight[:, 0], np.float64)
    lines = {}  # the inputs up to each token of its sequence
    for place, parent in enumerate(parents):
        if parent is not None:
            before = list(history) if parent < 0 else lines[parent]
            lines[place] = [*before, x[place]]
            seen = np.stack(lines[place][-KERNEL:])  # (kernel, channels)
            want = (weight.T * seen).sum(axis=0)
            assert np.abs(got[place] - want - np.arange(5)).max() < 1e-12
    assert np.abs(after - np.stack(lines[max(lines)][1 - KERNEL :])).max() == 0
