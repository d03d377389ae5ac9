"""Norms of gradients and updates by groups of parameters."""

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx.losses import dpo

from .policies import Perceptron, random_batch


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("embedding.weight", "embedding"),
        ("layers.attention.query.weight", "attention"),
        ("layers.attention.query_norm.weight", "norms"),
        ("layers.attention_norm.bias", "norms"),
        ("body.layers.feed_forward.up.lora.down", "feed_forward"),
        ("layers.3.mlp.weight", "mlp"),
        ("norm.weight", "norms"),
        ("3", "3"),
    ],
)
def test_groups_of_a_decoder(name, group):
    assert dpx.parameter_group(name) == group


def test_norms_of_gradients_and_updates():
    policy, reference = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))
    batch, rate = random_batch(), 0.5
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(rate))
    opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    step = eqx.filter_jit(dpx.make_step(dpo, optimizer, group_of=lambda name: name[0]))
    stepped, _, metrics = step(policy, opt_state, batch, reference)
    gradients, _ = eqx.filter_jit(dpx.make_grad(dpo))(policy, batch, reference)
    new, old = (eqx.filter(x, eqx.is_inexact_array) for x in (stepped, policy))
    changes = jax.tree.map(lambda x, y: x - y, new, old)
    for kind, tree in (("grad_norm", gradients), ("update_norm", changes)):
        want = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            group = jax.tree_util.keystr(path, simple=True, separator=".")[0]
            want[group] = want.get(group, 0.0) + float((leaf**2).sum())
        got = {n.split("/")[1]: v for n, v in metrics.items() if n.startswith(f"{kind}/")}
        assert got.keys() == want.keys()
        assert len(got) > 1
        for group, square in want.items():
            np.testing.assert_allclose(got[group], square**0.5, rtol=1e-10)
