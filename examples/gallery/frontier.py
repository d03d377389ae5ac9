# %% [markdown]
# # The frontier: expected reward against KL to the reference
#
# **Claim.** DPO reaches the best trade-off between reward and KL to the reference.
#
# **Source.** Rafailov et al., *Direct Preference Optimization*, 2023 (arXiv 2305.18290), figure 2,
# left.
#
# **What was reproduced.** The claim, for DPO with enough pairs; and the trade-off of every other
# offline loss of the library. The 121 sentences of the language are enumerated, so reward and KL
# have no sampling error, and the frontier is exact: it is that of `pi_ref exp(r / beta) / Z`. A
# seed draws pairs from the reference and their Bradley-Terry labels. Grammar, reward and
# reference are the same for all seeds. The spread is the 95% interval over 5 seeds.
#
# **What was not.** The paper's task (sentiment of film reviews), its other methods and its
# estimates from samples. The policy has the right form: the optimum is one of its members.
# Learning rate and steps were chosen for `dpo` on seeds 100 and 101.

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from shared import by_number, entry, intervals, lines, sentences, table as tables, training

from dpo_eqx import losses

# %% [markdown]
# Keywords other than `beta` have their defaults, except the offset of `odpo`: 0 would be `dpo`.
# `xpo` is left out, as it belongs to online rounds. `sft` has no `beta`.

# %%
VARIANTS: dict[str, Callable] = {
    "dpo, forward KL": partial(losses.dpo, divergence=losses.forward_kl),
    "dpo, Jensen-Shannon": partial(losses.dpo, divergence=losses.jensen_shannon),
    "dpo, per token": losses.length_normalized(losses.dpo),
    "odpo, offset 0.5": partial(losses.odpo, offset=0.5),
    "sft": lambda policy, reference, *, beta: losses.sft(policy, reference),
}
FAMILIES = {
    "functions of one difference": ("dpo", "robust_dpo", "exo", "hinge", "ipo", "discopop"),
    "other divergences": (*tuple(VARIANTS)[:2], "chi_po"),
    "margins and lengths": (*tuple(VARIANTS)[2:4], "r_dpo", "dpop"),
    "anchored at a reward": ("nca", "bco_pair", "sppo", "cal_dpo", "apo_zero", "apo_down"),
    "coupled pairs": ("aot", "aot_unpaired", "beta_dpo"),
    "single labels": ("kto", "bco", "apo_zero_unpaired"),
    "no reference": ("sft", "cpo", "orpo", "simpo", "alpha_po"),
}
BETAS = (2.0, 1.0, 0.7, 0.5, 0.35, 0.25)  # units of reward for one nat
RATE = 0.05  # of Adam
LANGUAGE = sentences.Language(words=3, length=4)


class Size(NamedTuple):
    """These losses with `pairs`, and DPO with each of `dpo_pairs`."""

    names: tuple[str, ...]
    pairs: int
    dpo_pairs: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 400


FULL = Size(sum(FAMILIES.values(), ()), 4096, dpo_pairs=(256, 1024, 16384))
QUICK = Size(("dpo",), 4096, dpo_pairs=(), seeds=(0, 1), steps=250)


class Results(NamedTuple):
    """The lines by name, of shape `(seeds, betas)`, and the frontier's KL and reward."""

    kl: dict[str, np.ndarray]
    reward: dict[str, np.ndarray]
    share: dict[str, np.ndarray]  # of the gain in reward that the frontier has at this KL
    frontier: np.ndarray


# %%
def sweep(name: str, pairs: int, size: Size, reference, reward) -> tuple[np.ndarray, np.ndarray]:
    """KL and reward of one loss, for each seed and each `beta`: one `vmap` over both."""
    loss = VARIANTS[name] if name in VARIANTS else getattr(losses, name)
    log_reference = LANGUAGE.log_probs(reference)

    def run(seed, beta):
        key = jax.random.key(seed)
        chosen, rejected = sentences.draw_pairs(key, log_reference, reward, pairs)
        batch, score = by_number.Pairs(chosen, rejected), by_number.score_pairs(LANGUAGE)
        if name in FAMILIES["single labels"]:
            both, is_chosen = jnp.concatenate([chosen, rejected]), jnp.arange(2 * pairs) < pairs
            # The prompt is one, so KTO's mismatched completion is that of another row.
            batch = by_number.Thumbs(both, is_chosen, kl=jnp.roll(both, 1))
            score = by_number.score_thumbs(LANGUAGE)
        policy = training.from_reference(
            partial(loss, beta=beta), reference, batch, score=score, rate=RATE, steps=size.steps
        )
        log_probs = LANGUAGE.log_probs(policy)
        return sentences.kl(log_probs, log_reference), sentences.expectation(log_probs, reward)

    seeds, betas = jnp.meshgrid(jnp.array(size.seeds), jnp.array(BETAS), indexing="ij")
    kl, gold = jax.jit(jax.vmap(run))(seeds.ravel(), betas.ravel())
    return np.asarray(kl.reshape(seeds.shape)), np.asarray(gold.reshape(seeds.shape))


def compute(size: Size) -> Results:
    reference, reward = sentences.random_task(LANGUAGE, jax.random.key(100))
    log_reference = LANGUAGE.log_probs(reference)
    best = jax.jit(partial(sentences.best_reward, log_reference, reward))
    at_reference = float(sentences.expectation(log_reference, reward))
    at = jnp.linspace(0, 6, 200)
    results = Results({}, {}, {}, np.stack([at, best(at)]))
    runs = {name: (name, size.pairs) for name in size.names}
    for line, run in (runs | {f"{n} pairs": ("dpo", n) for n in size.dpo_pairs}).items():
        results.kl[line], results.reward[line] = kl, gold = sweep(*run, size, reference, reward)
        gain = np.asarray(best(kl.ravel())).reshape(kl.shape) - at_reference
        results.share[line] = (gold - at_reference) / gain
    return results


def table(results: Results) -> str:
    """The KL at both ends of the sweep, and the share of the frontier's gain at equal KL."""
    ends, thirds = (0, -1), (0, 3, -1)
    header = ["loss", *(f"KL, beta {BETAS[i]}" for i in ends)]
    header += [f"share of the best gain, beta {BETAS[i]}" for i in thirds]
    columns = [(results.kl, i) for i in ends] + [(results.share, i) for i in thirds]
    rows = [[x, *(intervals.as_text(of[x][:, i]) for of, i in columns)] for x in results.kl]
    return tables.markdown(header, rows)


def picture(results: Results) -> Figure:
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    numbers = tuple(line for line in results.kl if line.endswith("pairs"))
    panels = FAMILIES | {"dpo by the number of pairs": numbers}
    all_axes = figure.subplots(2, 4, sharex=True, sharey=True)
    for axes, (title, family) in zip(all_axes.ravel(), panels.items(), strict=True):
        axes.plot(*results.frontier, "k--", linewidth=1, label="exact frontier")
        x, y = ({n: z[n] for n in family if n in z} for z in (results.kl, results.reward))
        lines.draw(axes, x, y)
        axes.set(title=title, xlim=(0, 6))
        axes.legend(fontsize=7, loc="lower right")
    figure.supxlabel("KL to the reference (nats)")
    figure.supylabel("expected reward")
    return figure


if __name__ == "__main__":
    entry.run("frontier", full=FULL, quick=QUICK, compute=compute, table=table, picture=picture)
