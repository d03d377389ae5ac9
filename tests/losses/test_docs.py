"""The examples of `docs/losses.md`, run as they stand there, against computations by hand."""

import dataclasses
import linecache
import re
from functools import partial
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpo_eqx as dpx
from dpo_eqx import losses

from ..policies import Perceptron, arrays, assert_close, random_batch

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
SGD = optax.sgd(0.5)
POLICY, REFERENCE = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))
BATCHES = [random_batch(seed, pairs=4) for seed in range(3)]
score_pairs = eqx.filter_jit(dpx.score_pairs)
score_unpaired = eqx.filter_jit(dpx.score_unpaired)


def blocks(section):
    """The Python of the page's introduction, and of the section with that title."""
    parts = re.split(r"^## (.*)\n", PAGE, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return re.findall(r"^```python\n(.*?)^```", parts[0] + sections[section], flags=re.M | re.S)


def read(section, *, only=None, **given):
    """What a reader has after typing the section, with a policy and data of their own.

    Or one of its blocks `only`, a number. What is jitted there may be traced once.
    """
    names = {
        "once": partial(chex.assert_max_traces, n=1),
        "policy": POLICY,
        "reference": REFERENCE,
        "optimizer": SGD,
        "opt_state": SGD.init(arrays(POLICY)),
        **given,
    }
    first, *rest = blocks(section)
    rest = rest if only is None else rest[only : only + 1]
    for number, block in enumerate([first, *rest]):
        block = block.replace("@eqx.filter_jit\n", "@eqx.filter_jit\n@once\n")
        file = f"<docs/losses.md: {section} {only} {number}>"
        # chex looks up the source of what it counts the traces of.
        linecache.cache[file] = (len(block), None, block.splitlines(keepends=True), file)
        exec(compile(block, file, "exec"), names)
    return names


def stepped(policy, gradient):
    return eqx.apply_updates(policy, jax.tree.map(lambda g: -0.5 * g, gradient))


def unpaired(batch):
    label = np.array([True, False, True, False])
    return dpx.UnpairedBatch(batch.prompt, batch.chosen, label, weight=batch.weight)


def test_the_margin_of_beta_dpo_is_carried():
    """By hand: `dpo` with the `beta` of each batch, and the margin after it."""
    got = read("Running statistics", only=0, batches=BATCHES)
    grad = eqx.filter_jit(lambda beta, *x: dpx.make_grad(partial(losses.dpo, beta=beta))(*x))
    policy, margin = POLICY, 0.0
    for batch in BATCHES:
        ours, theirs = (score_pairs(model, batch) for model in (policy, REFERENCE))
        rho = np.asarray(ours.chosen - theirs.chosen - ours.rejected + theirs.rejected)
        batch_margin = np.average(0.1 * rho, weights=batch.weight)
        beta = 0.1 * (1 + 0.6 * (batch_margin - margin))
        gradient, _ = grad(jnp.asarray(beta), policy, batch, REFERENCE)
        policy = stepped(policy, gradient)
        margin = 0.9 * margin + 0.1 * batch_margin
    assert_close(got["policy"], policy, 1e-12)
    np.testing.assert_allclose(got["margin"], margin, rtol=1e-10)


@eqx.filter_jit
@eqx.filter_grad
def bco_by_hand(policy, batch, delta):
    rho = dpx.score_unpaired(policy, batch).completion
    rho = rho - dpx.score_unpaired(REFERENCE, batch).completion
    logit = jnp.where(batch.label, 1.0, -1.0) * (0.1 * rho - delta)
    return (batch.weight * jnp.log1p(jnp.exp(-logit))).sum() / batch.weight.sum()


def test_the_shift_of_bco_is_carried():
    """By hand: the mean over the batches so far, used by the batch after."""
    batches = [unpaired(batch) for batch in BATCHES]
    got = read("Running statistics", only=1, unpaired_batches=batches)
    policy, middles = POLICY, []
    for batch in batches:
        ours, theirs = (score_unpaired(model, batch) for model in (policy, REFERENCE))
        reward = 0.1 * np.asarray(ours.completion - theirs.completion)
        delta = np.mean(middles) if middles else 0.0
        policy = stepped(policy, bco_by_hand(policy, batch, jnp.asarray(delta)))
        sides = (batch.label, ~batch.label)
        middles.append(np.mean([np.average(reward[s], weights=batch.weight[s]) for s in sides]))
    assert_close(got["policy"], policy, 1e-12)
    np.testing.assert_allclose(got["delta"], np.mean(middles), rtol=1e-10)
    assert got["count"] == 1 + len(batches)


def mean_dpo(policy, batch, beta):
    """The weighted mean of DPO's loss, by hand."""
    ours, theirs = (dpx.score_pairs(model, batch) for model in (policy, REFERENCE))
    margin = ours.chosen - theirs.chosen - ours.rejected + theirs.rejected
    return (batch.weight * jnp.log1p(jnp.exp(-beta * margin))).sum() / batch.weight.sum()


def test_several_preferences_in_one_step():
    helpful, harmless = BATCHES[:2]
    names = read("Several preferences in one step", helpful=helpful, harmless=harmless)

    @eqx.filter_jit
    @eqx.filter_grad
    def by_hand(policy):
        return 0.7 * mean_dpo(policy, helpful, 0.1) + 0.3 * mean_dpo(policy, harmless, 0.4)

    want = by_hand(POLICY)
    assert_close(names["gradients"], want, 1e-12)
    assert_close(names["summed"](POLICY, REFERENCE), want, 1e-12)


def test_diffusion_dpo():
    """Against the paper's loss, with the errors of policy and reference written out."""
    names = read("Diffusion models")
    rng = np.random.default_rng(0)
    chosen, rejected = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(2))
    weight = jnp.asarray([1.0, 2.0, 0.0, 0.5])
    drawn = names["image_pairs"](chosen, rejected, jax.random.key(2))
    batch = dataclasses.replace(drawn, weight=weight)
    noise, time = batch.noise, batch.time
    policy, reference = (
        names["Denoiser"](eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(seed))) for seed in (0, 1)
    )

    def mean(policy):
        total = 0.0
        for i in range(4):
            errors = [
                (
                    (
                        noise[i]
                        - model((1 - time[i]) ** 0.5 * x[i] + time[i] ** 0.5 * noise[i], time[i])
                    )
                    ** 2
                ).sum()
                for x in (chosen, rejected)
                for model in (policy, reference)
            ]
            inside = errors[0] - errors[1] - (errors[2] - errors[3])
            total -= weight[i] * jnp.log(1 / (1 + jnp.exp(5.0 * inside)))
        return total / weight.sum()

    loss, gradient = eqx.filter_jit(eqx.filter_value_and_grad(mean))(policy)
    opt_state = SGD.init(arrays(policy))
    got, _, metrics = names["diffusion_step"](policy, opt_state, batch, reference)
    assert_close(got, stepped(policy, gradient), 1e-12)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
    assert metrics["rewards/margins"] != 0
    options = {"score": dpx.denoising_score(names["schedule"]), "microbatches": 2}
    grad = eqx.filter_jit(dpx.make_grad(partial(losses.dpo, beta=5.0), **options))
    assert_close(grad(policy, batch, reference)[0], arrays(gradient), 1e-12)
