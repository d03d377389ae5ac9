"""JAX's guard against accidental broadcasting, on: only scalars broadcast without being told."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, losses, models

from .policies import Perceptron, Plain, random_batch

BATCH = random_batch(pairs=2)
IDS = jnp.arange(6)

# Everything that adds a vector to a matrix somewhere.
CONFIGS = {
    "llama": {},
    "gpt2": {
        "norm": "layer",
        "rotary": None,
        "max_length": 64,
        "query_bias": True,
        "output_bias": True,
        "feed_forward_bias": True,
        "gated": False,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    },
    "phi": {"norm": "layer", "parallel": True, "tied": False, "unembedding_bias": True},
    "gemma2": {"post_norms": True, "softcap": 3.0, "attention_softcap": 3.0, "windows": (2, None)},
}


@pytest.fixture(autouse=True)
def raising():
    with jax.numpy_rank_promotion("raise"):
        yield


def decoder(**options):
    config = models.Config(vocab=11, width=8, layers=2, heads=2, **options)
    return models.Transformer(config, key=jax.random.key(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_decoders(name):
    policy = decoder(**CONFIGS[name])

    def total(policy):
        return policy(IDS, key=jax.random.key(1)).sum()

    eqx.filter_eval_shape(eqx.filter_grad(total), policy)


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_adapters_of_quantised_decoders(format):
    policy = models.add_lora(models.quantize(decoder(), format), rank=2, key=jax.random.key(0))
    eqx.filter_eval_shape(policy, IDS)
    eqx.filter_eval_shape(models.merge_lora, policy)


def test_generate():
    answers = models.generate(decoder(), BATCH.prompt, max_new_tokens=2, temperature=0, eos=3)
    assert answers.ids.shape == (2, 2)


@pytest.mark.parametrize("policy", [Perceptron(jax.random.key(0)), Plain(decoder())])
@pytest.mark.parametrize("loss", [losses.dpo, losses.aot])
def test_a_step(standard_promotion, policy, loss):
    optimizer = optax.adamw(1e-3)
    step = dpx.make_step(loss, optimizer, microbatches=2)
    state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    eqx.filter_eval_shape(step, policy, state, BATCH, policy)


def test_comparisons_and_counts():
    policy = Perceptron(jax.random.key(0))
    sides = eqx.filter_jit(dpx.compare)(policy, policy, BATCH)
    counted = dpx.count_preferences(sides.policy, jnp.zeros(2), (sides.chosen_kl, sides.chosen_kl))
    assert counted.mean()["win_rate"] == 0.5


def test_packed_rows():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}] * 2
    packed = data.pack(rows, 12)
    layout = dpx.PackedLayout(packed.lengths[0], 12, packed.longest, packed.longest_pair)
    np.testing.assert_array_equal(layout.positions, [0, 1, 2, 3, 2, 0, 1, 2, 3, 2, 0, 0])
    eqx.filter_eval_shape(decoder().hidden, jnp.asarray(packed.ids[0]), layout)
