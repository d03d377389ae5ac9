"""Simulates healthy and sick runs of DPO, and draws the pictures of the page on reports.

    python docs/scripts/curves.py

All runs share a small model, a reward and their first parameters. A run differs from the healthy
one in one thing. The steps and the evaluations are those of the library.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import dpo_eqx as dpx

PAGES = Path(__file__).parents[1] / "howto"
VOCAB, WIDTH, PROMPT, LENGTH = 32, 32, 2, 8
PAIRS, HELD_OUT, BATCH, STEPS = 16384, 512, 32, 250
BETA, RATE = 0.5, 3e-3
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#555555"
SHOWN = ("loss", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "logps/chosen")

Metrics = dict[str, np.ndarray]  # of shape (steps,)


class Policy(eqx.Module):
    """Logits from the last token and the mean of the tokens before it."""

    embedding: jax.Array
    hidden: jax.Array
    head: jax.Array

    def __init__(self, key: jax.Array):
        a, b, c = jax.random.split(key, 3)
        self.embedding = jax.random.normal(a, (VOCAB, WIDTH))
        self.hidden = jax.random.normal(b, (2 * WIDTH, WIDTH)) / np.sqrt(WIDTH)
        self.head = jax.random.normal(c, (WIDTH, VOCAB)) / np.sqrt(WIDTH)

    def __call__(self, ids):
        x = self.embedding[ids]
        mean = jnp.cumsum(x, axis=0) / jnp.arange(1, len(ids) + 1)[:, None]
        return jnp.tanh(jnp.concatenate([x, mean], axis=1) @ self.hidden) @ self.head


class Run(NamedTuple):
    """What distinguishes a run; each field has a leading axis of runs under `vmap`."""

    rate: jax.Array  # of Adam
    flipped: jax.Array  # the share of wrong labels in the training pairs
    pairs: jax.Array  # the number of different training pairs
    edits: jax.Array  # whether a rejected completion is the chosen one with one token changed


RUNS = {
    "healthy": Run(RATE, 0.0, PAIRS, False),
    "rate_too_high": Run(30 * RATE, 0.0, PAIRS, False),
    "rate_too_low": Run(RATE / 100, 0.0, PAIRS, False),
    "noise": Run(RATE, 0.4, PAIRS, False),
    "over_fit": Run(RATE, 0.0, 64, False),
    "both_fall": Run(RATE, 0.0, PAIRS, True),
}


def draw(policy: Policy, key: jax.Array, count: int) -> jax.Array:
    """`count` rows of a random prompt and a completion by the policy."""
    first, *keys = jax.random.split(key, 1 + LENGTH)
    ids = jnp.zeros((count, PROMPT + LENGTH), jnp.int32)
    ids = ids.at[:, :PROMPT].set(jax.random.randint(first, (count, PROMPT), 0, VOCAB))
    for place, key in enumerate(keys, PROMPT):
        logits = jax.vmap(policy)(ids)[:, place - 1]
        ids = ids.at[:, place].set(jax.random.categorical(key, logits))
    return ids


def make_pairs(policy: Policy, key: jax.Array, count: int, edits: jax.Array) -> jax.Array:
    """Ids of shape `(2, count, tokens)`: the chosen completion first, by Bradley-Terry."""
    a, b, c, d = jax.random.split(key, 4)
    one, other = draw(policy, a, count), draw(policy, b, count)
    place = jax.random.randint(d, (count,), PROMPT, PROMPT + LENGTH)
    edited = one.at[jnp.arange(count), place].set(other[jnp.arange(count), place])
    other = other.at[:, :PROMPT].set(one[:, :PROMPT])
    other = jnp.where(edits, edited, other)
    worth = 0.6 * jax.random.normal(jax.random.key(99), (VOCAB,))
    reward = jnp.stack([worth[rows[:, PROMPT:]].sum(1) for rows in (one, other)])
    swap = jnp.diff(reward + jax.random.gumbel(c, reward.shape), axis=0)[0] > 0
    pairs = jnp.stack([one, other])
    return jnp.where(swap[None, :, None], pairs[::-1], pairs)


def batch_of(pairs: jax.Array) -> dpx.PreferenceBatch:
    """The batch of ids of shape `(2, pairs, tokens)`."""

    def tokens(ids):
        return dpx.Tokens(ids, jnp.ones(ids.shape, bool))

    chosen, rejected = pairs
    return dpx.PreferenceBatch(
        tokens(chosen[:, :PROMPT]), tokens(chosen[:, PROMPT:]), tokens(rejected[:, PROMPT:])
    )


def simulate(run: Run) -> tuple[Metrics, Metrics]:
    """The metrics of each step on the training pairs, and on held-out pairs."""
    keys = jax.random.split(jax.random.key(0), 5)
    reference = Policy(keys[0])
    training = make_pairs(reference, keys[1], PAIRS, run.edits)
    held_out = batch_of(make_pairs(reference, keys[2], HELD_OUT, run.edits))
    flips = jax.random.uniform(keys[3], (PAIRS,)) < run.flipped
    training = jnp.where(flips[None, :, None], training[::-1], training)
    rows = jax.random.randint(keys[4], (STEPS, BATCH), 0, PAIRS) % run.pairs
    loss = partial(dpx.losses.dpo, beta=BETA)
    optimizer = optax.adam(run.rate)
    step, evaluate = dpx.make_step(loss, optimizer), dpx.make_eval(loss)

    def advance(carry, rows):
        policy, opt_state = carry
        seen = evaluate(policy, held_out, reference).mean()
        batch = batch_of(training[:, rows])
        policy, opt_state, metrics = step(policy, opt_state, batch, reference)
        return (policy, opt_state), (metrics, seen)

    return jax.lax.scan(advance, (reference, optimizer.init(reference)), rows)[1]


def simulate_all() -> dict[str, tuple[Metrics, Metrics]]:
    """The metrics of all runs by name, computed as one program."""
    runs = Run(*map(jnp.asarray, zip(*RUNS.values(), strict=True)))
    results = jax.device_get(jax.jit(jax.vmap(simulate))(runs))
    return {
        name: jax.tree.map(lambda x, number=number: x[number], results)
        for number, name in enumerate(RUNS)
    }


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    """The mean over neighbouring steps."""
    weights = np.ones(width)
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")


def picture(training: Metrics, held_out: Metrics) -> Figure:
    """Four panels, as in the report: loss, accuracy, rewards and log-probabilities."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, key in zip(axes[:2], ("loss", "rewards/accuracies"), strict=True):
        axis.plot(smooth(training[key]), color=BLUE, label="training")
        axis.plot(held_out[key], color=GREY, ls="--", label="held out")
        axis.set_title({"loss": "loss", "rewards/accuracies": "accuracy"}[key])
    for axis, key in zip(axes[2:], ("rewards", "logps"), strict=True):
        axis.plot(held_out[f"{key}/chosen"], color=BLUE, label="chosen, held out")
        axis.plot(held_out[f"{key}/rejected"], color=ORANGE, ls="--", label="rejected, held out")
        axis.set_title({"rewards": "rewards (nats)", "logps": "log-probabilities (nats)"}[key])
    axes[0].axhline(np.log(2), color="0.8", lw=1, zorder=0)
    axes[2].axhline(0, color="0.8", lw=1, zorder=0)
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    """Runs all simulations, writes a picture of each, and prints how they end."""
    for name, (training, held_out) in simulate_all().items():
        picture(training, held_out).savefig(PAGES / f"curves_{name}.png", dpi=80)
        ends = ", ".join(f"{key} {held_out[key][-1]:.2f}" for key in SHOWN)
        print(f"{name}: training loss {training['loss'][-20:].mean():.2f}; held out: {ends}")


if __name__ == "__main__":
    main()
