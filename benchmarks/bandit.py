"""Online and offline DPO on a bandit whose optimum is known, with the same number of labels.

    python -m benchmarks.bandit                     # the distances to the optimum
    python -m benchmarks.bandit --figure bandit.png

There is one prompt and one token. The reference rarely draws the best token, and the optimum of
DPO, proportional to `pi_ref exp(r / beta)`, often. The runs differ in who draws the pairs.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import dpo_eqx as dpx
from dpo_eqx import losses, models

BETA = 0.5
PAIRS = 256  # of each round, with one label each
ROUNDS = 1600
# Rates of Adam at the start of a cosine: the best for each, of 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.
OFFLINE_RATE, ONLINE_RATE = 0.1, 0.02
REFERENCE = np.array([0.0002, 0.3, 0.25, 0.2, 0.1498, 0.1])
REWARDS = np.array([4.3, 0.5, 0.0, -0.5, 0.8, -1.0])


class Bandit(eqx.Module):
    """One token after any prompt, with a logit for each id."""

    logits: Float[Array, " arms"]

    def __call__(self, ids: Array) -> Float[Array, "length arms"]:
        return jnp.broadcast_to(self.logits, (len(ids), *self.logits.shape))


def optimum() -> Float[np.ndarray, " arms"]:
    """The policy that maximises reward minus `beta` times the KL to the reference."""
    weights = REFERENCE * np.exp(REWARDS / BETA)
    return weights / weights.sum()


def distance(
    probabilities: Float[Array | np.ndarray, "*rounds arms"],
) -> Float[Array | np.ndarray, "*rounds"]:
    """The total variation distance to the optimum."""
    return abs(probabilities - optimum()).sum(-1) / 2


def train(
    key: PRNGKeyArray, *, is_online: bool, rounds: int = ROUNDS
) -> Float[Array, "rounds arms"]:
    """DPO from the reference. Returns the policy's probabilities after each round."""
    reference = Bandit(jnp.log(jnp.asarray(REFERENCE, jnp.float32)))
    rate = ONLINE_RATE if is_online else OFFLINE_RATE
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, rounds))
    step = dpx.make_step(partial(losses.dpo, beta=BETA), optimizer)
    prompt = dpx.Tokens(jnp.zeros((PAIRS, 1), jnp.int32), jnp.ones((PAIRS, 1), bool))
    rewards = jnp.asarray(REWARDS, jnp.float32)

    def one_round(carry, key):
        policy, opt_state = carry
        for_draws, for_labels = jax.random.split(key)
        writer = policy if is_online else reference
        drawn = models.sample(writer, prompt, samples=2, max_new_tokens=1, key=for_draws)
        seen = rewards[drawn.tokens.ids[..., 0]]
        # With this noise a label prefers as the Bradley-Terry model says.
        labels = seen + jax.random.gumbel(for_labels, seen.shape)
        batch = dpx.pair_samples(prompt, drawn, labels)
        policy, opt_state, _ = step(policy, opt_state, batch, reference)
        return (policy, opt_state), jax.nn.softmax(policy.logits)

    start = dpx.snapshot(reference)
    carry = (start, optimizer.init(eqx.filter(start, eqx.is_array)))
    return jax.jit(lambda keys: jax.lax.scan(one_round, carry, keys)[1])(
        jax.random.split(key, rounds)
    )


def draw(runs: dict[str, Float[Array, "rounds arms"]], path: Path) -> None:
    """The distances after each round, and the probabilities at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    over_labels, at_end = figure.subplots(1, 2)
    arms = np.arange(len(REFERENCE))
    bars = {"reference": REFERENCE, "offline": None, "online": None, "optimum": optimum()}
    colours = dict(zip(bars, ("tab:gray", "tab:orange", "tab:blue", "black"), strict=True))
    for name, probabilities in runs.items():
        labels = PAIRS * np.arange(1, 1 + len(probabilities))
        over_labels.plot(labels, distance(probabilities), color=colours[name], label=name)
        bars[name] = np.asarray(probabilities[-1])
    over_labels.axhline(0.02, color="black", linestyle=":", linewidth=1, label="0.02")
    over_labels.set(xlabel="labels", ylabel="total variation distance to the optimum", yscale="log")
    for place, (name, heights) in enumerate(bars.items()):
        at_end.bar(arms + 0.2 * (place - 1.5), heights, 0.2, color=colours[name], label=name)
    at_end.set(xlabel="token", ylabel="probability at the end", xticks=arms)
    for axes in (over_labels, at_end):
        axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains in both ways, and prints the distances."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--figure", type=Path, help="a file to draw the first seed into")
    options = parser.parse_args(arguments)
    print(f"{options.rounds * PAIRS} labels; the reference is {distance(REFERENCE):.3f} away")
    print("| seed | offline | online |\n| --- | --- | --- |")
    for seed in range(options.seeds):
        key = jax.random.key(seed)
        runs = {
            name: train(key, is_online=name == "online", rounds=options.rounds)
            for name in ("offline", "online")
        }
        cells = (f"{float(distance(run[-1])):.4f}" for run in runs.values())
        print(f"| {seed} | {' | '.join(cells)} |", flush=True)
        if options.figure and seed == 0:
            draw(runs, options.figure)


if __name__ == "__main__":
    main()
