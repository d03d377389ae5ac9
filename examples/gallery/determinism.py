# %% [markdown]
# # Certain preferences: DPO ignores `beta`, IPO does not
#
# **Claim.** If the better answer always wins, DPO ends at the best answer alone, whatever `beta`
# is. IPO stops at a distance from the reference that `beta` sets.
#
# **Source.** Azar et al., *A General Theoretical Paradigm to Understand Learning from Human
# Preferences*, 2023 (arXiv 2310.12036), sections 4.2 (DPO) and 5 (IPO).
#
# **What was reproduced.** Both halves of the claim, on three answers that are compared in all
# pairs. Labels follow Bradley-Terry with rewards 1, 0 and -1, or they are certain. The limits are
# exact: DPO's is `pi_ref exp(r / beta) / Z`, the best answer alone if labels are certain; IPO's
# has the mean preference in place of `r`. A seed draws the reference. Beside them is a remedy, DPO
# with `label_smoothing`, which never believes that a label is certain. The spread is the 95%
# interval over 5 seeds.
#
# **What was not.** The paper's references and `beta`s, and samples: each pair enters with its exact
# probability. Rate and steps were chosen on seeds 100 and 101.

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from shared import by_number, entry, intervals, lines, sentences, table as tables

import dpo_eqx as dpx
from dpo_eqx import losses

LANGUAGE = sentences.Language(words=2, length=1)  # three answers: the end token and two words
LOSSES: dict[str, Callable] = {
    "dpo": losses.dpo,
    "ipo": losses.ipo,
    "dpo, smoothing 0.1": partial(losses.dpo, label_smoothing=0.1),
}
GAPS = {"Bradley-Terry": 1.0, "certain": 1e3}  # rewards are (1, 0, -1) times this
BETAS = (0.1, 0.2, 0.5, 1.0, 2.0)  # units of reward for one nat
CHOSEN, REJECTED = np.nonzero(~np.eye(3, dtype=bool))  # all ordered pairs


class Size(NamedTuple):
    steps: int = 4000
    names: tuple[str, ...] = tuple(LOSSES)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


FULL, QUICK = Size(), Size(steps=400, names=("dpo", "ipo"), seeds=(0, 1))


class Results(NamedTuple):
    """KL to the reference, as a share of the KL that the best answer alone has."""

    kl: np.ndarray  # (seeds, losses, gaps, betas, steps)
    limit: np.ndarray  # (seeds, 2, gaps, betas): of DPO and IPO after infinitely many steps


# %%
def run(loss: Callable, steps: int, reference: sentences.Table, gap, beta) -> jax.Array:
    """The share of the KL after each step of training from the reference."""
    # Every pair is in the batch in both orders, each with its probability as its weight.
    wins = sentences.preferences(rewards(gap))[CHOSEN, REJECTED]
    batch = by_number.Pairs(CHOSEN, REJECTED, weight=wins)
    optimizer, score = optax.adam(0.05), by_number.score_pairs(LANGUAGE)
    step = dpx.make_step(partial(loss, beta=beta), optimizer, score=score)
    log_reference = LANGUAGE.log_probs(reference)

    def one_step(state, _):
        policy, opt_state, _ = step(state[0], state[1], batch, reference)
        return (policy, opt_state), share(LANGUAGE.log_probs(policy), log_reference)

    start = reference, optimizer.init(eqx.filter(reference, eqx.is_array))
    return jax.lax.scan(one_step, start, length=steps)[1]


def limits(reference: sentences.Table, gap, beta) -> jax.Array:
    """The share of the KL that the optima of DPO and of IPO have."""
    log_reference, reward = LANGUAGE.log_probs(reference), rewards(gap)
    means = sentences.preferences(reward).mean(axis=1)
    optima = (sentences.optimum(log_reference, x, beta) for x in (reward, means))
    return jnp.stack([share(log_probs, log_reference) for log_probs in optima])


def share(log_probs: jax.Array, log_reference: jax.Array) -> jax.Array:
    return sentences.kl(log_probs, log_reference) / -log_reference[0]


def rewards(gap) -> jax.Array:
    return gap * jnp.array([1.0, 0.0, -1.0])


def compute(size: Size) -> Results:
    keys = jax.vmap(jax.random.key)(jnp.array(size.seeds))
    drawn = jax.vmap(lambda key: jax.random.normal(key, (1, LANGUAGE.vocab)))(keys)
    grid = jnp.meshgrid(jnp.array([*GAPS.values()]), jnp.array(BETAS), indexing="ij")

    def over_grid(function: Callable) -> jax.Array:
        """For each reference, gap and `beta`: one program, by `vmap`."""
        mapped = jax.vmap(jax.vmap(function, (None, 0, 0)), (0, None, None))
        found = jax.jit(mapped)(sentences.Table(drawn), *(x.ravel() for x in grid))
        return found.reshape(len(size.seeds), *grid[0].shape, -1)

    kl = [over_grid(partial(run, LOSSES[name], size.steps)) for name in size.names]
    return Results(np.stack(kl, axis=1), np.moveaxis(np.asarray(over_grid(limits)), -1, 1))


# %%
def table(results: Results) -> str:
    """The KL at the end for each loss and `beta`, beside the limits."""
    rows = []
    for number, label in enumerate(GAPS):
        found = dict(zip(LOSSES, np.moveaxis(results.kl[..., -1], 1, 0), strict=False))
        exact = zip(("dpo, exact", "ipo, exact"), np.moveaxis(results.limit, 1, 0), strict=True)
        for name, kl in sorted((found | dict(exact)).items()):
            cells = (intervals.as_text(kl[:, number, i]) for i in range(len(BETAS)))
            rows.append([f"{label}: {name}", *cells])
    return tables.markdown(["share of the most KL", *(f"beta {beta}" for beta in BETAS)], rows)


def picture(results: Results) -> Figure:
    figure = Figure(figsize=(12, 4), layout="constrained")
    *by_beta, over_steps = figure.subplots(1, 3, sharey=True)
    betas = np.broadcast_to(BETAS, (len(results.kl), len(BETAS)))
    for number, (axes, label) in enumerate(zip(by_beta, GAPS, strict=True)):
        kl = dict(zip(LOSSES, np.moveaxis(results.kl[:, :, number, :, -1], 1, 0), strict=False))
        lines.draw(axes, dict.fromkeys(kl, betas), kl)
        for exact in results.limit[:, :, number].mean(axis=0):
            axes.plot(BETAS, exact, "k:", label="exact limits")
        axes.set(title=f"{label} labels", xlabel="beta (reward for one nat)", xscale="log")
    steps = np.arange(1, results.kl.shape[-1] + 1)
    for i, name in enumerate(("dpo", "ipo")):
        for j, style in ((0, "-"), (len(BETAS) - 1, "--")):
            kl, label = results.kl[:, i, 1, j].mean(axis=0), f"{name}, beta {BETAS[j]}"
            over_steps.plot(steps, kl, style, color=lines.COLOURS[i], label=label)
    over_steps.set(title="certain labels", xlabel="steps of Adam", xscale="log")
    by_beta[0].set_ylabel("KL to the reference, as a share of\nthe KL of the best answer alone")
    for axes in (by_beta[0], over_steps):
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), fontsize=8)
    return figure


if __name__ == "__main__":
    entry.run("determinism", full=FULL, quick=QUICK, compute=compute, table=table, picture=picture)
