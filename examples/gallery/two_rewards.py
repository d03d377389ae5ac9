# %% [markdown]
# # Two rewards at once: the Pareto front of MODPO
#
# **Claim.** Multi-Objective DPO (MODPO) trains the best policy for any weighting of two rewards,
# from labels for one of them and a model of the other. It is `odpo`, with a `vmap` over weights.
#
# **Source.** Zhou et al., *Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct
# Preference Optimization*, 2023 (arXiv 2310.03708). The loss is that of the authors' code,
# `-log sigma((beta (rho_w - rho_l) - (1 - w) (r2(y_w) - r2(y_l))) / w)`.
#
# **What was reproduced.** The front, on 121 sentences that are enumerated. So all rewards are
# exact, and so is the optimum for each weight, `pi_ref exp((w r1 + (1 - w) r2) / beta) / Z`.
# Beside it is the paper's other method, loss weighting: the second reward has as many labels of
# its own, and `w` weights two DPO losses. The rewards are in conflict. A seed draws the pairs and
# their labels; rewards and reference are fixed. The spread is the 95% interval over 5 seeds.
#
# **What was not.** The paper's tasks, reinforcement learning, and a second reward that is itself
# learned: here it is known. Rate and steps are those of `frontier.py`, chosen on seeds 100 and 101.

# %%
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from shared import by_number, entry, intervals, lines, sentences, table as tables, training

from dpo_eqx import losses

LANGUAGE = sentences.Language(words=3, length=4)
BETA, PAIRS = 0.5, 4096  # `beta` in units of reward for one nat
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the first reward


class Size(NamedTuple):
    steps: int = 400
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    methods: tuple[str, ...] = ("MODPO", "loss weighting")


FULL, QUICK = Size(), Size(steps=150, seeds=(0, 1), methods=("MODPO",))


class Results(NamedTuple):
    """For each method, expected rewards and the share of the weighted objective's best gain."""

    rewards: dict[str, np.ndarray]  # (seeds, weights, 2)
    share: dict[str, np.ndarray]  # (seeds, weights)
    front: np.ndarray  # (points, 2), exact; the task is the same for all seeds


# %%
def modpo(weight, chosen, rejected, rewards):
    # The second reward is a margin of each pair, so it travels in `per_pair`.
    offset = (1 - weight) / weight * (rewards[1][chosen[0]] - rewards[1][rejected[0]])
    pairs = by_number.Pairs(chosen[0], rejected[0], per_pair={"offset": offset})
    return partial(losses.odpo, beta=BETA / weight), pairs


def loss_weighting(weight, chosen, rejected, rewards):
    weights = jnp.repeat(jnp.stack([weight, 1 - weight]), chosen.shape[1])
    pairs = by_number.Pairs(chosen.ravel(), rejected.ravel(), weight=weights)
    return partial(losses.dpo, beta=BETA), pairs


METHODS = {"MODPO": modpo, "loss weighting": loss_weighting}


def make_task() -> tuple[sentences.Chain, jax.Array]:
    """The reference, and two rewards in conflict: less of the first is more of the second."""
    first, second = jax.random.split(jax.random.key(100))
    reference, reward = sentences.random_task(LANGUAGE, first)
    other = (sentences.random_reward(LANGUAGE, second) - reward) / 2**0.5
    return reference, jnp.stack([reward, other])


def sweep(method, size: Size, reference, rewards) -> jax.Array:
    """All log-probabilities, of shape `(seeds, weights, sentences)`, by one `vmap` over both."""
    log_reference = LANGUAGE.log_probs(reference)
    train = partial(training.from_reference, score=by_number.score_pairs(LANGUAGE))

    def run(seed, weight):
        keys = jax.random.split(jax.random.key(seed))
        draw = partial(sentences.draw_pairs, writer=log_reference, pairs=PAIRS)
        chosen, rejected = jax.vmap(lambda k, r: draw(k, reward=r))(keys, rewards)
        loss, batch = method(weight, chosen, rejected, rewards)
        policy = train(loss, reference, batch, rate=0.05, steps=size.steps)
        return LANGUAGE.log_probs(policy)

    over_both = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
    return jax.jit(over_both)(jnp.array(size.seeds), jnp.array(WEIGHTS))


def compute(size: Size) -> Results:
    reference, rewards = make_task()
    log_reference = LANGUAGE.log_probs(reference)

    def mixed(weight):
        return weight * rewards[0] + (1 - weight) * rewards[1]

    def best(weight):
        return sentences.optimum(log_reference, mixed(weight), BETA)

    def gain(log_probs, weight):
        """What the weighted reward minus `beta` times KL gains over the reference."""
        more = (jnp.exp(log_probs) - jnp.exp(log_reference)) @ mixed(weight)
        return more - BETA * sentences.kl(log_probs, log_reference)

    def share(log_probs, weight):
        return gain(log_probs, weight) / gain(best(weight), weight)

    front = jnp.exp(jax.vmap(best)(jnp.linspace(0, 1, 50))) @ rewards.T
    results, weights = Results({}, {}, np.asarray(front)), jnp.array(WEIGHTS)
    for name in size.methods:
        log_probs = sweep(METHODS[name], size, reference, rewards)
        results.rewards[name] = np.asarray(jnp.exp(log_probs) @ rewards.T)
        results.share[name] = np.asarray(jax.vmap(jax.vmap(share), (0, None))(log_probs, weights))
    return results


# %%
def table(results: Results) -> str:
    """Both rewards, and the share of the best gain, for each weight."""
    rows = [
        [name, f"{weight}", *map(intervals.as_text, (*rewards[:, i].T, results.share[name][:, i]))]
        for name, rewards in results.rewards.items()
        for i, weight in enumerate(WEIGHTS)
    ]
    return tables.markdown(["method", "weight", "reward 1", "reward 2", "share of best"], rows)


def picture(results: Results) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    on_front, by_weight = figure.subplots(1, 2)
    on_front.plot(*results.front.T, "k--", linewidth=1, label="exact front")
    both = ({name: found[..., i] for name, found in results.rewards.items()} for i in (0, 1))
    lines.draw(on_front, *both)
    on_front.set(xlabel="expected first reward", ylabel="expected second reward")
    weights = {name: np.broadcast_to(WEIGHTS, x.shape) for name, x in results.share.items()}
    lines.draw(by_weight, weights, results.share)
    by_weight.axhline(1, color="black", linestyle="--", linewidth=1)
    by_weight.set(xlabel="weight of the first reward", ylabel="share of the best gain")
    on_front.legend()
    return figure


if __name__ == "__main__":
    entry.run("two_rewards", full=FULL, quick=QUICK, compute=compute, table=table, picture=picture)
