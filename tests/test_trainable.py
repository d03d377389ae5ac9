"""`trainable` selects arrays by patterns, and a pattern that matches nothing is an error."""

import equinox as eqx
import jax
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses
from dpo_eqx._jax.paths import leaf_name

from .policies import Perceptron, random_batch

POLICY = Perceptron(jax.random.key(0), rate=0.5)
ALL = {
    "embedding",
    "mlp.layers.0.weight",
    "mlp.layers.0.bias",
    "mlp.layers.1.weight",
    "mlp.layers.1.bias",
}


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, ALL),
        ({"only": r"layers\.1\."}, {"mlp.layers.1.weight", "mlp.layers.1.bias"}),
        ({"without": "embedding"}, ALL - {"embedding"}),
        (
            {"only": ["^embedding$", "bias$"], "without": r"0\.bias"},
            {"embedding", "mlp.layers.1.bias"},
        ),
    ],
)
def test_what_is_selected(options, want):
    selected = dpx.trainable(POLICY, **options)
    assert jax.tree.structure(selected) == jax.tree.structure(POLICY)
    leaves = jax.tree_util.tree_leaves_with_path(selected)
    assert all(type(leaf) is bool for _, leaf in leaves)
    assert {leaf_name(path) for path, leaf in leaves if leaf} == want


def test_only_the_selected_arrays_get_a_gradient():
    selected = dpx.trainable(POLICY, only=r"layers\.1\.bias")
    grad = eqx.filter_jit(dpx.make_grad(losses.sft, trainable=selected))
    gradients, _ = grad(POLICY, random_batch(pairs=2), key=jax.random.key(0))
    (leaf,) = jax.tree.leaves(gradients)
    assert np.abs(leaf).max() > 0
    assert gradients.mlp.layers[1].bias is leaf


@pytest.mark.parametrize("name", ["only", "without"])
def test_a_pattern_that_matches_nothing(name):
    message = rf"`{name}` must match .*got '\^embeds\$'.*Paths near to it: embedding"
    with pytest.raises(ValueError, match=message):
        dpx.trainable(POLICY, **{name: "^embeds$"})
    with pytest.raises(ValueError, match="matches none of 5"):  # a flag is no array
        dpx.trainable(POLICY, **{name: r"dropout\.inference"})


def test_nothing_left_to_train():
    with pytest.raises(ValueError, match="must leave at least one"):
        dpx.trainable(POLICY, only="embedding", without="embedding")
