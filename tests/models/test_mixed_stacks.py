"""Stacks in which some layers have experts and others a dense feed-forward block.

`test_more_families.py` compares their logits with `transformers`, as those of all families.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import models
from dpo_eqx.models._checkpoint.config_json import write_config

MIXED = models.Config(
    vocab=40, width=16, layers=4, heads=4, feed_forward=12, experts=3, experts_per_token=2,
    expert_width=8, dense=(True, False, False, True), query_key_norm=True, family="qwen3_moe",
)  # fmt: skip
QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 4}


def test_each_kind_of_block_is_stacked_over_its_own_layers():
    layers = models.Transformer(MIXED, key=jax.random.key(0)).layers
    assert layers.dense_feed_forward.up.weight.shape == (2, 12, 16)
    assert layers.feed_forward.up.weight.shape == (2, 3, 8, 16)
    assert layers.feed_forward.router.weight.shape == (2, 3, 16)
    assert layers.attention.query.weight.shape == (4, 16, 16)


def _router_weight(policy):
    return policy.layers.feed_forward.router.weight


def test_routers_of_the_layers_that_have_one_are_observed():
    policy = models.Transformer(MIXED, key=jax.random.key(0))
    policy = eqx.tree_at(_router_weight, policy, _router_weight(policy).at[1].set(0))
    scores = models.router_scores(policy, jnp.arange(7))
    assert scores.shape == (2, 7, 3)
    assert np.all(np.abs(scores[0]).max(axis=-1) > 0)
    assert np.all(scores[1] == 0)


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [1]}, (False, True, False, False)),
        ({"decoder_sparse_step": 2}, (True, False, True, False)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (True, True, True, False)),
        ({"decoder_sparse_step": 5}, (True,) * 4),
        ({"num_experts": 0}, (True,) * 4),
    ],
)
def test_layers_without_experts_in_a_file(keys, dense):
    config = models.read_config({**QWEN, **keys})
    assert config.dense == dense
    assert models.read_config(write_config(config)) == config


def test_lists_that_do_not_fit_are_refused():
    sizes = {"vocab": 8, "width": 8, "layers": 2, "heads": 2}
    with pytest.raises(ValueError, match="`dense` must have one entry per layer, 2; got 1"):
        models.Config(**sizes, dense=(True,), experts=2, experts_per_token=1)
    with pytest.raises(ValueError, match="`dense` must be true for each layer, or for none"):
        models.Config(**sizes, dense=(True, False))
