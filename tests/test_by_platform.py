"""Sizes follow the platform that a program is compiled for, not the one that traces it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx._head import tiling
from dpo_eqx._jax.by_platform import by_platform

TOKENS, WIDTH, VOCAB = 512, 2, 2**14
# Of `TOKENS * VOCAB` logits, a CPU holds a quarter at once; an accelerator holds all.
PARTS = {"cpu": 4, "cuda": 1, "tpu": 1}


def total(hidden, head):
    targets = jnp.arange(TOKENS)
    return dpx.linear_token_log_probs(hidden, head, targets).sum()


def divergence(hidden, head):
    return dpx.linear_kl(hidden, head, 2 * hidden, head).sum()


def shapes():
    sizes = (TOKENS, WIDTH), (VOCAB, WIDTH)
    return [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]


@pytest.mark.parametrize("function", [total, divergence])
@pytest.mark.parametrize("platform", PARTS)
def test_one_traced_program_has_the_tiles_of_each_platform(function, platform):
    """In the backward pass, too."""
    for traced in (jax.jit(f).trace(*shapes()) for f in (function, jax.grad(function, (0, 1)))):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        for parts in (1, 4):
            tile = f"tensor<{TOKENS}x{VOCAB // parts}xf32>"
            assert (tile in text) == (parts == PARTS[platform])


def test_a_program_exported_for_several_platforms_runs_on_this_one(monkeypatch):
    monkeypatch.setitem(tiling.LOGITS_AT_ONCE, "cpu", TOKENS * 8)
    function = jax.jit(jax.value_and_grad(divergence, (0, 1)))
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=size.shape), jnp.float32) for size in shapes()]
    operands[1] = operands[1][:64]
    exported = jax.export.export(function, platforms=["cpu", "cuda", "tpu"])(*operands)
    for got, want in zip(
        jax.tree.leaves(exported.call(*operands)), jax.tree.leaves(function(*operands)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_equal_plans_leave_no_choice_in_the_program():
    def run(plan, x):
        return plan * x

    def one(x):
        return by_platform(lambda _: 2.0, run, x)

    def several(x):
        return by_platform({"cpu": 2.0, "cuda": 3.0, "other": 3.0}.__getitem__, run, x)

    primitives = [
        {equation.primitive.name for equation in jax.make_jaxpr(f)(1.0).jaxpr.eqns}
        for f in (one, several)
    ]
    assert "cond" not in primitives[0]
    assert "cond" in primitives[1]
    assert jax.jit(several)(1.0) == one(1.0) == 2


def test_two_sums_in_one_operation_are_those_of_two(monkeypatch):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=size)) for size in ((9, 4), (24, 4)))

    def log_probs(hidden, head):
        return dpx.linear_token_log_probs(hidden, head, jnp.arange(9), chunk_size=4)

    want = jax.jit(log_probs)(hidden, head)
    monkeypatch.setattr(tiling, "CUDA", "cpu")
    jointly = jax.jit(lambda *x: log_probs(*x))
    operands = [x.count(" init: ") for x in jointly.lower(hidden, head).as_text().splitlines()]
    assert max(operands) == 2
    np.testing.assert_allclose(jointly(hidden, head), want, rtol=0, atol=1e-14)
