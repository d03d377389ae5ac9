"""Drawing on CPUs from weights that are taken out of their stacks: the tokens, and the programs."""

import re

import equinox as eqx
import jax
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import models
from dpo_eqx.models._decoder import apart

SIZES = {"vocab": 40, "width": 16, "heads": 2, "feed_forward": 24}
DENSE = models.Config(**SIZES, layers=3, tied=True, windows=(None, 4, None))
CONFIGS = {
    "dense": DENSE,
    "learned positions": models.Config(
        **SIZES, layers=2, rotary=None, max_length=32, unembedding_bias=True, softcap=5.0
    ),
    "convolution": models.Config(
        **SIZES,
        layers=3,
        recurrence=models.Recurrence(kind="convolution", kernel=3),
        recurrent=(True, False, True),
    ),
    "experts": models.Config(**SIZES, layers=2, experts=4, experts_per_token=2),
}
STEPS = 12
PROMPT = dpx.Tokens(np.arange(10).reshape(2, 5), np.arange(5) < np.array([[5], [3]]))
OPTIONS = {"samples": 2, "max_new_tokens": STEPS, "key": jax.random.key(1)}


def decoder(config):
    """A policy in float64 whose draws differ from row to row."""
    policy = models.Transformer(config, key=jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x.astype(np.float64) if eqx.is_array(x) else x, policy)


def adapted(config):
    policy = models.add_lora(decoder(config), rank=2, key=jax.random.key(2))
    return jax.tree.map(lambda x: x + 0.01 if eqx.is_inexact_array(x) else x, policy)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("dense", decoder),
        *(pytest.param(name, decoder, marks=pytest.mark.slow) for name in list(CONFIGS)[1:]),
        pytest.param("dense", adapted, marks=pytest.mark.slow, id="adapters"),
    ],
)
def test_a_stack_draws_the_same(name, build, monkeypatch):
    """Other platforms read the stack."""
    policy = build(CONFIGS[name])
    assert apart.is_worth_it(policy, 4, "cpu")
    drawn = models.sample(policy, PROMPT, **OPTIONS)
    monkeypatch.setattr(apart, "LEAST_ROWS", 5)
    jax.clear_caches()
    stacked = models.sample(policy, PROMPT, **OPTIONS)
    jax.clear_caches()
    assert np.array_equal(drawn.tokens.ids, stacked.tokens.ids)
    np.testing.assert_allclose(drawn.log_probs, stacked.log_probs, rtol=1e-12)
    # Not vacuous: all rows differ.
    assert len(np.unique(np.asarray(drawn.tokens.ids).reshape(4, STEPS), axis=0)) == 4


def lowered(policy, rows, platform):
    arrays, static = eqx.partition(policy, eqx.is_array)

    @jax.jit
    def draw(arrays, prompt):
        policy = eqx.combine(arrays, static)
        return models.generate(policy, prompt, max_new_tokens=STEPS, temperature=0)

    prompt = dpx.Tokens(np.ones((rows, 5), np.int32), np.ones((rows, 5), bool))
    return draw.trace(arrays, prompt).lower(lowering_platforms=(platform,))


def test_only_cpus_take_the_weights_apart():
    """On other platforms, the loop over tokens has one over layers in it."""
    policy = models.Transformer(DENSE, key=jax.random.key(0))

    def loops(policy, rows):
        platforms = ("cpu", "cuda", "tpu")
        return [lowered(policy, rows, x).as_text().count("stablehlo.while") for x in platforms]

    on_cpu, *elsewhere = loops(policy, 3)
    assert elsewhere == [on_cpu + 1] * 2
    # One row reads the stack where it lies. Quantised weights would be decoded as a whole.
    assert len(set(loops(policy, 1))) == 1
    assert len(set(loops(models.quantize(policy, "int8"), 3))) == 1


def test_large_weights_stay_in_their_stack():
    """As in Llama-3.1-8B, and those of Qwen3-0.6B do not."""
    sizes = {"width": 4096, "heads": 32, "feed_forward": 14336, "vocab": 128_256, "layers": 32}
    small = {"width": 1024, "heads": 16, "feed_forward": 3072, "vocab": 151_936, "layers": 28}

    def is_worth_it(**sizes):
        found = []

        def ask():
            policy = models.Transformer(models.Config(**sizes), key=jax.random.key(0))
            found.append(apart.is_worth_it(policy, 8, "cpu"))

        jax.eval_shape(ask)  # so that no array is made
        return found

    assert is_worth_it(**small, tied=True) == [True]
    assert is_worth_it(**sizes) == [False]


def test_a_token_copies_neither_weights_nor_caches():
    """In the compiled loop nothing is copied that is as large as the cache of one layer."""
    rows, policy = 3, models.Transformer(DENSE, key=jax.random.key(0))
    text = lowered(policy, rows, "cpu").compile().as_text()
    bodies = re.findall(r"body=%?([\w.\-]+)", text)
    assert bodies
    cache = rows * STEPS * DENSE.width
    for body in bodies:
        code = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]
        sizes = [
            np.prod([int(n) for n in shape.split(",")])
            for shape in re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", code)
        ]
        assert max(sizes, default=0) < cache, f"{body} copies {sizes}."
