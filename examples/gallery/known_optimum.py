# %% [markdown]
# # The optimum of each loss
#
# **Claim.** With enough data, each of these losses ends at the policy that its theory names: DPO at
# `pi_ref exp(r / beta) / Z`, and others elsewhere.
#
# **Source.** Rafailov et al. 2023 (arXiv 2305.18290, section 4) for DPO; Wang et al. 2023 (arXiv
# 2309.16240, theorem 1) for other divergences; Huang et al. 2024 (arXiv 2407.13399) for `chi_po`;
# Azar et al. 2023 (arXiv 2310.12036, section 5) for IPO. The others follow from the loss.
#
# **What was reproduced.** All of it, on one prompt with 20 answers. Labels follow Bradley-Terry.
# The batch has every ordered pair of answers, with its probability as its weight. A seed draws
# rewards and reference. The spread is the 95% interval over 5 seeds.
#
# **What was not.** Few pairs, which the entry on the frontier has. `kto`, `hinge` and `dpop`,
# whose optimum is not finite or not known. Rate and steps were chosen on seeds 100 and 101.

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from shared import by_number, entry, intervals, lines, optima, sentences, table as tables, training

from dpo_eqx import losses

LANGUAGE, BETA, FLIPPED, RATE = sentences.Language(words=19, length=1), 0.5, 0.1, 0.05
ANSWERS = LANGUAGE.sentences  # each is one token
CHOSEN, REJECTED = (x.ravel() for x in np.indices((ANSWERS, ANSWERS)))
ALPHA = losses.alpha_divergence(0.25)
SHOWN = ("dpo", "dpo, forward KL", "dpo, Jensen-Shannon", "chi_po", "ipo", "bco")


class Case(NamedTuple):
    loss: Callable
    optimum: Callable[[optima.Bandit, float], jax.Array]
    words: str
    batch: str = "pairs"


DIVERGENCES = {
    "forward KL": (losses.forward_kl, "1 - exp(-rho) = r / beta + c"),
    "Jensen-Shannon": (losses.jensen_shannon, "log(2 s(rho)) = r / beta + c"),
    "alpha 0.25": (ALPHA, "4 - 4 exp(-rho / 4) = r / beta + c"),
}
ROBUST = partial(losses.robust_dpo, label_smoothing=FLIPPED)
CHI, ALPHA_PO = lambda rho: rho + jnp.exp(rho), partial(losses.alpha_po, alpha=0.25, gamma=0.0)
ALONE, LOG_PI = optima.of_likelihood(lambda log_pi: log_pi), "log pi = r / beta + c"
CASES = {
    "dpo": Case(losses.dpo, optima.boltzmann, "rho = r / beta + c"),
    "robust_dpo, 10% flipped": Case(ROBUST, optima.boltzmann, "rho = r / beta + c", "flipped"),
    **{
        f"dpo, {name}": Case(partial(losses.dpo, divergence=s), optima.by_divergence(s), words)
        for name, (s, words) in DIVERGENCES.items()
    },
    "chi_po": Case(losses.chi_po, optima.by_divergence(CHI), "rho + exp(rho) = r / beta + c"),
    "ipo": Case(losses.ipo, optima.of_ipo, "rho = (2 w - 1) / (2 beta) + c"),
    "bco": Case(losses.bco, optima.of_bco, "rho = logit(w) / beta + c", "thumbs"),
    "simpo, gamma 0": Case(partial(losses.simpo, gamma=0.0), ALONE, LOG_PI),
    "cpo, alpha 0": Case(partial(losses.cpo, alpha=0.0), ALONE, LOG_PI),
    "alpha_po": Case(ALPHA_PO, optima.of_likelihood(ALPHA), "4 - 4 pi^(-1/4) = r / beta + c"),
    "sft": Case(losses.sft, optima.of_sft, "pi = w c"),
}


class Size(NamedTuple):
    names: tuple[str, ...] = tuple(CASES)
    steps: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


FULL, QUICK = Size(), Size(names=("dpo", "ipo", "bco"), steps=500, seeds=(0, 1))


class Results(NamedTuple):
    bandits: optima.Bandit  # with an axis of seeds first
    trained: dict[str, np.ndarray]  # log-probabilities, (seeds, answers)
    optimum: dict[str, np.ndarray]  # log-probabilities, (seeds, answers)


# %%
def train(case: Case, steps: int, bandit: optima.Bandit) -> jax.Array:
    """The log-probabilities of all answers after training from the reference."""
    options: dict = {} if case.loss is losses.sft else {"beta": BETA}
    wins, score = bandit.wins, by_number.score_pairs(LANGUAGE)
    if case.batch == "flipped":
        wins = (1 - FLIPPED) * wins + FLIPPED * wins.T
    batch = by_number.Pairs(CHOSEN, REJECTED, weight=wins.ravel())
    if case.batch == "thumbs":
        numbers, label = np.tile(np.arange(ANSWERS), 2), jnp.arange(2 * ANSWERS) < ANSWERS
        weight = jnp.concatenate([bandit.share, 1 - bandit.share])
        batch, score = (
            by_number.Thumbs(numbers, label, weight=weight),
            by_number.score_thumbs(LANGUAGE),
        )
        # With this shift the best rewards belong to a policy whose probabilities add up to 1.
        rho = case.optimum(bandit, BETA) - bandit.log_reference
        options["delta"] = (BETA * rho - jax.scipy.special.logit(bandit.share)).mean()
    reference = sentences.Table(bandit.log_reference[jnp.r_[1:ANSWERS, 0]][None])  # the end is last
    loss = partial(case.loss, **options)
    policy = training.from_reference(loss, reference, batch, score=score, rate=RATE, steps=steps)
    return LANGUAGE.log_probs(policy)


def compute(size: Size) -> Results:
    keys = jax.vmap(jax.random.key)(jnp.array(size.seeds))
    bandits = jax.vmap(partial(optima.draw, ANSWERS))(keys)

    def for_each(function: Callable) -> dict[str, np.ndarray]:
        mapped = {name: jax.jit(jax.vmap(partial(function, CASES[name]))) for name in size.names}
        return {name: np.asarray(run(bandits)) for name, run in mapped.items()}

    trained = for_each(lambda case, bandit: train(case, size.steps, bandit))
    return Results(bandits, trained, for_each(lambda case, bandit: case.optimum(bandit, BETA)))


# %%
def table(results: Results) -> str:
    first, rows = results.optimum["dpo"], []
    for name, optimum in results.optimum.items():
        ends = results.trained[name], np.asarray(results.bandits.log_reference), first
        shown = (intervals.as_text(optima.distance(end, optimum), digits=4) for end in ends)
        rows.append([name, CASES[name].words, *shown])
    return tables.markdown(["loss", "its optimum", "trained", "reference", "dpo's optimum"], rows)


def picture(results: Results) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    reward, reference = (np.asarray(x[0]) for x in results.bandits)
    order, shown = np.argsort(reward), [n for n in SHOWN if n in results.trained]
    for name, colour, marker in zip(shown, lines.COLOURS, lines.MARKERS, strict=False):
        optimum, trained = (x[name][0] - reference for x in (results.optimum, results.trained))
        axes.plot(reward[order], optimum[order], color=colour)
        axes.plot(reward, trained, marker, color=colour, markersize=4, label=name)
    axes.set(xlabel="reward", ylabel="log(pi / pi_ref), in nats", title="trained, and exact lines")
    axes.legend()
    return figure


if __name__ == "__main__":
    name = "known_optimum"
    entry.run(name, full=FULL, quick=QUICK, compute=compute, table=table, picture=picture)
