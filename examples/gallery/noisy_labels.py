# %% [markdown]
# # Noisy labels
#
# **Claim.** If labels are flipped, DPO's margins shrink, so that it is less sure than it should be.
# Label smoothing (cDPO) shrinks them further. Robust DPO, which is told the flip rate, stays
# calibrated. So does Robust Preference Optimisation (ROPO), which doubts improbable labels.
#
# **Source.** cDPO: Mitchell 2023, *A note on DPO with noisy preferences*. Robust DPO: Chowdhury et
# al. 2024, arXiv 2403.00409. ROPO: Liang et al. 2024, arXiv 2404.04102, only its loss.
#
# **What was reproduced, and what was not.** All of it for predictions up to 75%; above, all are too
# sure. No margins are large enough on rare sentences. There are 2048 pairs of a language of 341
# sentences. A seed of 5 draws the language, reward, pairs and flips. The settings were not tuned.

# %%
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid
from matplotlib.figure import Figure
from shared import by_number, entry, lines, sentences
from shared.intervals import as_text
from shared.table import markdown
from shared.training import from_reference

import dpo_eqx as dpx
from dpo_eqx import losses

LANGUAGE = sentences.Language(words=4, length=4)
BETA = 0.5
FLIPS = (0.0, 0.1, 0.2, 0.3, 0.4)


def ropo(policy, reference, *, alpha=6.0):
    """ROPO's loss: the weight of a pair, at most 1, falls if its label looks wrong."""
    result = losses.dpo(policy, reference, beta=BETA)
    doubt = sigmoid(result.rejected_reward - result.chosen_reward)
    scale = 4 * alpha / (1 + alpha) ** 2
    return losses.PairLoss(
        scale * (result.loss + alpha * doubt), result.chosen_reward, result.rejected_reward
    )


LOSSES = {
    "dpo": lambda rate: partial(losses.dpo, beta=BETA),
    "cdpo": lambda rate: partial(losses.dpo, beta=BETA, label_smoothing=rate),
    "robust_dpo": lambda rate: partial(losses.robust_dpo, beta=BETA, label_smoothing=rate),
    "ropo": lambda rate: ropo,
}


class Size(NamedTuple):
    seeds: tuple[int, ...]
    pairs: int = 2048
    steps: int = 150


class Results(NamedTuple):
    """Exact values of shape (losses, seeds, rates, ...), over all pairs of the reference."""

    reward: np.ndarray  # expected true reward, in standard deviations over the sentences
    accuracy: np.ndarray  # how often the margin has the sign of the true difference in reward
    slope: np.ndarray  # of the margins on the true log-odds; 1 if calibrated
    predicted: np.ndarray  # (..., bins): the mean predicted probability of a preference
    came_true: np.ndarray  # (..., bins): how often it came true, by clean labels


FULL, QUICK = Size(seeds=(0, 1, 2, 3, 4)), Size(seeds=(0, 1), pairs=1024, steps=100)


# %%
def judge(log_probs, before, reward):
    """The exact measures of a policy, over all pairs of sentences that the reference may draw."""
    rewards = BETA * (log_probs - before)
    margin, true = (x[:, None] - x[None, :] for x in (rewards, reward))
    drawn = jnp.exp(before[:, None] + before[None, :])
    calibration = dpx.calibrate(margin.ravel(), (drawn * sigmoid(true)).ravel(), bins=10)
    different = drawn * (true != 0)
    accuracy = (different * (margin * true > 0)).sum() / different.sum()
    slope = (drawn * margin * true).sum() / (drawn * true**2).sum()
    return sentences.expectation(log_probs, reward), accuracy, slope, *calibration.mean()


def one_seed(key, make_loss, size):
    """The measures at each flip rate; the flips at a lower rate are among those at a higher one."""
    keys = jax.random.split(key, 4)
    reference = sentences.bigrams(LANGUAGE, keys[0])
    before, reward = LANGUAGE.log_probs(reference), sentences.random_reward(LANGUAGE, keys[1])
    chosen, rejected = sentences.draw_pairs(keys[2], before, reward, size.pairs)
    chance = jax.random.uniform(keys[3], (size.pairs,))

    def at(rate):
        flipped = chance < rate
        sides = jnp.where(flipped, rejected, chosen), jnp.where(flipped, chosen, rejected)
        score, pairs = by_number.score_pairs(LANGUAGE), by_number.Pairs(*sides)
        policy = from_reference(
            make_loss(rate), reference, pairs, score=score, rate=0.01, steps=size.steps
        )
        return judge(LANGUAGE.log_probs(policy), before, reward)

    return jax.vmap(at)(jnp.array(FLIPS))


def compute(size: Size) -> Results:
    keys = jax.vmap(jax.random.key)(jnp.array(size.seeds))
    runs = [
        jax.jit(jax.vmap(partial(one_seed, make_loss=make_loss, size=size)))(keys)
        for make_loss in LOSSES.values()
    ]
    return Results(*(np.stack(x) for x in zip(*runs, strict=True)))


def table(results: Results) -> str:
    header = ["flipped", *(f"{name}: {what}" for what in ("reward", "slope") for name in LOSSES)]
    rows = [
        [f"{rate:.0%}", *(as_text(x[:, i]) for x in (*results.reward, *results.slope))]
        for i, rate in enumerate(FLIPS)
    ]
    return markdown(header, rows)


def picture(results: Results) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    reward, slope, reliability = figure.subplots(1, 3)
    rates = np.broadcast_to(100 * np.array(FLIPS), results.reward[0].shape)
    at, by_name = FLIPS.index(0.3), partial(zip, LOSSES, strict=True)
    for axes, values in ((reward, results.reward), (slope, results.slope)):
        lines.draw(axes, dict.fromkeys(LOSSES, rates), dict(by_name(values)))
        axes.set(xlabel="flipped labels, %")
    reward.set(ylabel="true reward, standard deviations")
    slope.set(ylabel="slope of margins on the true log-odds")
    slope.axhline(1, color="k", linestyle=":", linewidth=1)
    empty = (results.predicted[:, :, at] == 0).any(axis=1, keepdims=True)  # a bin of some seed
    predicted, came_true = (
        dict(by_name(np.where(empty, np.nan, 100 * x[:, :, at])))
        for x in (results.predicted, results.came_true)
    )
    lines.draw(reliability, predicted, came_true)
    reliability.axline((50, 50), slope=1, color="k", linestyle=":", linewidth=1)
    reliability.set(xlabel="predicted, %", ylabel="came true, % (at 30% flipped)")
    reliability.legend(fontsize=8)
    return figure


# %%
if __name__ == "__main__":
    entry.run("noisy_labels", full=FULL, quick=QUICK, compute=compute, table=table, picture=picture)
