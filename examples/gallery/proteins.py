# %% [markdown]
# # Proteins: a masked model learns from an assay
#
# **Claim.** A masked model of natural proteins ranks mutants by pseudo-log-likelihood without
# labels. DPO on pairs of an assay ranks them better. The wild type, which nature liked best, then
# falls in rank, towards its rank in the assay.
#
# **Source.** Pseudo-log-likelihood: Salazar et al. 2020 (arXiv 1910.14659), equation 1. Ranking
# of mutants: Meier et al. 2021 (bioRxiv 2021.07.09.450648). DPO on assays: Widatalla et al. 2024
# (bioRxiv 2024.05.20.595026), whose model is autoregressive. The rank of the wild type is ours.
#
# **What was not reproduced:** real proteins, real assays and large models. A family is a random
# chain of 12 amino acids. Evolution explains a part of the fitness, and a term for each site the
# rest. Mutants have two mutations; those that are judged are drawn apart from those in pairs.
# A seed of 5 draws all of it. Settings were chosen on seed 100.

# %%
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from shared import entry, intervals, landscape, lines, table as tables
from shared.training import on_batches

import dpo_eqx as dpx
from dpo_eqx import losses


class Size(NamedTuple):
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    width: int = 32
    natural: int = 4000  # proteins of the family for the masked model
    fit_steps: int = 600
    pairs: int = 1000
    tune_steps: int = 150
    held_out: int = 1000  # mutants
    betas: tuple[float, ...] = (1.0, 0.3, 0.1)


FULL = Size()
QUICK = Size((0, 1), 16, natural=1000, fit_steps=200, tune_steps=60, held_out=300, betas=(0.3,))


class Results(NamedTuple):
    names: list[str]
    fitness: np.ndarray  # (seeds, 1 + held_out): the wild type first
    score: np.ndarray  # (seeds, models, 1 + held_out): pseudo-log-likelihoods
    natural: np.ndarray  # (seeds, models): the mean of natural proteins


# %%
def train(loss, model, chosen, rejected, key, *, groups, steps, rate, batch) -> landscape.Masked:
    """The model after training on random pairs; the one that comes in is the reference."""

    def draw(key):
        rows = jax.random.randint(key, (batch,), 0, len(chosen))
        return landscape.pairs(chosen[rows], rejected[rows])

    score = dpx.pseudo_score(landscape.MASK, groups=groups)
    return on_batches(loss, model, draw, key, score=score, rate=rate, steps=steps)


def scores(model: landscape.Masked, proteins: jax.Array) -> jax.Array:
    """The exact pseudo-log-likelihood of each protein."""
    score, batch = dpx.pseudo_score(landscape.MASK), landscape.pairs(proteins, proteins)
    return jnp.asarray(score(model, batch, key=None).chosen)


def one_seed(key, size: Size):
    keys = jax.random.split(key, 9)
    world = landscape.draw(keys[0])
    natural = world.family.draw(keys[1], size.natural)
    # Supervised training on pseudo-log-likelihoods, four sites apart, is masked language modelling.
    fit = partial(train, groups=4, steps=size.fit_steps, rate=3e-3, batch=64)
    model = landscape.Masked(size.width, key=keys[2])
    reference = fit(losses.sft, model, natural, natural, keys[3])
    a, b = (landscape.mutants(world.wild_type, k, size.pairs) for k in jax.random.split(keys[4]))
    better = jax.nn.sigmoid(world.fitness(a) - world.fitness(b))
    a_wins = (jax.random.uniform(keys[5], better.shape) < better)[:, None]
    sides = jnp.where(a_wins, a, b), jnp.where(a_wins, b, a)
    tune = partial(train, groups=None, steps=size.tune_steps, rate=1e-3, batch=32)
    objectives = losses.sft, *(partial(losses.dpo, beta=beta) for beta in size.betas)
    models = reference, *(tune(loss, reference, *sides, keys[6]) for loss in objectives)
    held_out = landscape.mutants(world.wild_type, keys[7], size.held_out)
    judged = jnp.concatenate([world.wild_type[None], held_out])
    others = world.family.draw(keys[8], 200)
    means = [scores(model, others).mean() for model in models]
    return world.fitness(judged), jnp.stack([scores(m, judged) for m in models]), jnp.stack(means)


def compute(size: Size) -> Results:
    keys = jax.vmap(jax.random.key)(jnp.array(size.seeds))
    found = jax.jit(jax.vmap(partial(one_seed, size=size)))(keys)
    names = ["reference", "SFT", *(f"DPO, beta {beta:g}" for beta in size.betas)]
    return Results(names, *map(np.asarray, found))


# %%
def share_above(values: np.ndarray) -> np.ndarray:
    """The share of mutants above the wild type, in percent. It is the first on the last axis."""
    return 100 * (values[..., 1:] > values[..., :1]).mean(axis=-1)


def measures(results: Results) -> dict[str, np.ndarray]:
    pairs = zip(results.fitness[:, 1:], results.score[..., 1:], strict=True)
    ranked = [[stats.spearmanr(fitness, x)[0] for x in scores] for fitness, scores in pairs]
    best = np.argsort(-results.score[..., 1:])[..., :20]
    fitness = np.broadcast_to(results.fitness[:, None, 1:], results.score[..., 1:].shape)
    return {
        "rank correlation": np.array(ranked),
        "mutants above the wild type, %": share_above(results.score),
        "fitness of the best 20": np.take_along_axis(fitness, best, -1).mean(-1),
        "natural proteins, nats": results.natural,
    }


def table(results: Results) -> str:
    found, true = measures(results), share_above(results.fitness)
    cells = [[intervals.as_text(x) for x in values.T] for values in found.values()]
    best = np.sort(results.fitness[:, 1:])[:, -20:].mean(-1)
    assay = ["the assay", "1", intervals.as_text(true), intervals.as_text(best), ""]
    return tables.markdown(["ranked by", *found], [*zip(results.names, *cells, strict=True), assay])


def picture(results: Results) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    before, after, ranks = figure.subplots(1, 3)
    for axes, model in ((before, 0), (after, -1)):
        fitness, score = results.fitness[0], results.score[0, model]
        axes.plot(fitness[1:], score[1:], ".", color=lines.COLOURS[0], markersize=2)
        axes.plot(fitness[0], score[0], "*", color=lines.COLOURS[1], markersize=12)
        axes.set(xlabel="fitness", title=f"{results.names[model]} (seed 0; star: wild type)")
    before.set_ylabel("pseudo-log-likelihood, nats")
    shares = np.column_stack([share_above(results.score), share_above(results.fitness)])
    for seed in shares:
        ranks.plot([*results.names, "the assay"], seed, "o-", markersize=3, alpha=0.7)
    ranks.set(title="a line for each seed", ylabel="mutants above the wild type, %")
    ranks.tick_params("x", rotation=30)
    return figure


# %%
if __name__ == "__main__":
    entry.run("proteins", full=FULL, quick=QUICK, compute=compute, table=table, picture=picture)
