# %% [markdown]
# # Length: a reader who likes long answers
#
# **Claim.** If readers prefer long answers, DPO learns length. `r_dpo`, which takes off a reward
# for each token, does not. Other remedies are averages over tokens (`simpo`, DPO per token) and
# less weight for the longer answer's surplus (`ld_score`).
#
# **Source.** Park et al. 2024 (arXiv 2403.19159). The others: Meng et al. 2024 (arXiv 2405.14734),
# Lambert et al. 2024 (arXiv 2411.15124), Liu et al. 2024 (arXiv 2409.06411).
#
# **What was reproduced.** At equal KL, DPO adds more tokens with a biased reader than with a fair
# one. `r_dpo` does not, if its `alpha` is the bias. The others remove a part of it; `simpo` goes
# beyond this KL. The spread is the 95% interval over 5 seeds, which draw tasks and pairs.
#
# **What was not.** Language models, and an unknown bias. Settings were chosen on other seeds.

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from shared import by_number, entry, intervals, lines, sentences, table as tables, training

import dpo_eqx as dpx
from dpo_eqx import losses

LANGUAGE, PAIRS = sentences.Language(words=3, length=5), 4096
LENGTHS = LANGUAGE.tokens.mask.sum(axis=1).astype(np.float32)
BIAS = 0.5  # reward for each token, to readers
BETAS = (2.0, 1.0, 0.5, 0.25)  # units of reward for one nat
AT = 1.0  # the KL at which losses are compared


class Case(NamedTuple):
    loss: Callable
    scale: float = 1.0  # of `beta`: averages over tokens are smaller than sums
    score: dpx.Score = by_number.score_pairs(LANGUAGE)
    by_token: bool = False  # whether the score reads tokens, and not numbers of sentences
    bias: float = BIAS


CASES = {
    "dpo, a reader without bias": Case(losses.dpo, bias=0.0),
    "dpo": Case(losses.dpo),
    "r_dpo": Case(partial(losses.r_dpo, alpha=BIAS)),
    "dpo, per token": Case(losses.length_normalized(losses.dpo), scale=3.0),
    "simpo": Case(partial(losses.simpo, gamma=0.0), scale=10.0),
    "dpo, ld_score(0.5)": Case(losses.dpo, score=dpx.ld_score(0.5), by_token=True),
    "dpo, ld_score(0)": Case(losses.dpo, score=dpx.ld_score(0.0), by_token=True),
}


class Size(NamedTuple):
    names: tuple[str, ...] = tuple(CASES)
    steps: int = 300
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


FULL, QUICK = Size(), Size(names=tuple(CASES)[:3], steps=150, seeds=(0,))


class Curve(NamedTuple):
    """What a policy has beyond the reference: KL in nats, reward without bias, and tokens."""

    kl: jax.Array | np.ndarray  # (seeds, betas)
    quality: jax.Array | np.ndarray  # (seeds, betas)
    length: jax.Array | np.ndarray  # (seeds, betas)


Results = dict[str, Curve]


# %%
def task(key: jax.Array) -> tuple[sentences.Chain, jax.Array]:
    """A reference, and a reward that says nothing about length under the reference."""
    reference, reward = sentences.random_task(LANGUAGE, key)
    probs = jnp.exp(LANGUAGE.log_probs(reference))
    centred = LENGTHS - probs @ LENGTHS
    slope = (probs * centred) @ reward / ((probs * centred) @ centred)
    return reference, reward - slope * centred


def run(case: Case, steps: int, seed, beta) -> Curve:
    for_task, for_pairs = jax.random.split(jax.random.key(seed))
    reference, quality = task(for_task)
    log_reference = LANGUAGE.log_probs(reference)
    reward = quality + case.bias * LENGTHS
    numbers = sentences.draw_pairs(for_pairs, log_reference, reward, PAIRS)
    batch = LANGUAGE.pairs(*numbers) if case.by_token else by_number.Pairs(*numbers)
    loss = partial(case.loss, beta=beta * case.scale)
    policy = training.from_reference(
        loss, reference, batch, score=case.score, rate=0.05, steps=steps
    )
    log_probs = LANGUAGE.log_probs(policy)
    gains = (
        sentences.expectation(log_probs, x) - sentences.expectation(log_reference, x)
        for x in (quality, jnp.asarray(LENGTHS))
    )
    return Curve(sentences.kl(log_probs, log_reference), *gains)


def compute(size: Size) -> Results:
    seeds, betas = jnp.meshgrid(jnp.array(size.seeds), jnp.array(BETAS), indexing="ij")

    def curve(case: Case) -> Curve:
        found = jax.jit(jax.vmap(partial(run, case, size.steps)))(seeds.ravel(), betas.ravel())
        return Curve(*(np.asarray(x).reshape(seeds.shape) for x in found))

    return {name: curve(CASES[name]) for name in size.names}


def at(curve: Curve, values: jax.Array | np.ndarray) -> np.ndarray:
    """The values at the KL `AT` for each seed, between the nearest `beta`s; NaN if it has none."""
    pairs = zip(curve.kl, values, strict=True)
    return np.array([np.interp(AT, x, y, left=np.nan, right=np.nan) for x, y in pairs])


# %%
def table(results: Results) -> str:
    """At the KL `AT`: what the policy of a reader without bias has, and what others have beyond."""
    fair, header = next(iter(results.values())), ["loss", "reward without bias", "tokens"]
    rows = []
    for name, curve in results.items():
        gains = (at(curve, value) for value in curve[1:])
        if curve is not fair:
            gains = (x - at(fair, y) for x, y in zip(gains, fair[1:], strict=True))
        rows.append([name, *(intervals.as_text(x).replace("nan ± nan", "") for x in gains)])
    return tables.markdown(header, rows)


def picture(results: Results) -> Figure:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    kl, quality, length = ({n: np.asarray(x[i]) for n, x in results.items()} for i in range(3))
    left, right = figure.subplots(1, 2)
    lines.draw(left, kl, length)
    lines.draw(right, kl, quality)
    left.set(xlabel="KL to the reference (nats)", ylabel="tokens beyond the reference")
    right.set(
        xlabel="KL to the reference (nats)", ylabel="reward without bias, beyond the reference"
    )
    left.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    entry.run("length", full=FULL, quick=QUICK, compute=compute, table=table, picture=picture)
