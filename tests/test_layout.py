"""Layouts, against their definition token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx


@pytest.mark.parametrize("prompt_length", [1, 2, 4])
@pytest.mark.parametrize("widths", [(), (3,), (3, 2), (1, 1, 1)])
def test_positions_and_mask(prompt_length, widths):
    layout = dpx.Layout(jnp.asarray(prompt_length), 4, widths)
    # (completion, its position) of each token of the row; -1 is the prompt.
    tokens = [(-1, i) for i in range(4)]
    tokens += [(k, prompt_length + i) for k, width in enumerate(widths) for i in range(width)]
    assert layout.length == len(tokens)
    np.testing.assert_array_equal(layout.positions, [position for _, position in tokens])
    mask = layout.mask()
    for j, (mine, _) in enumerate(tokens):
        for i, (other, position) in enumerate(tokens):
            in_prompt = other == -1 and position < prompt_length
            padding = other == -1 and mine == -1 and min(i, j) >= prompt_length
            assert mask[j, i] == (i <= j and (in_prompt or padding or other == mine)), (j, i)


def test_no_row_of_the_mask_is_empty():
    assert dpx.Layout(jnp.asarray(1), 3, (2, 2)).mask().any(axis=1).all()


def test_under_vmap_and_jit():
    lengths = jnp.array([1, 3])
    masks = jax.jit(jax.vmap(lambda n: dpx.Layout(n, 3, (2,)).mask()))(lengths)
    for n, mask in zip(lengths, masks, strict=True):
        np.testing.assert_array_equal(mask, dpx.Layout(n, 3, (2,)).mask())


def test_lengths_of_completions_are_held_in_int32():
    layout = dpx.Layout(jnp.asarray(1), 3, (2, 2), np.array([1, 2], np.int64))
    assert layout.completion_lengths.dtype == jnp.int32
    assert dpx.Layout(jnp.asarray(1), 3, (2,)).completion_lengths is None
