# %% [markdown]
# # Real pairs: what a small decoder learns from them
#
# **Claim.** DPO on pairs that people labelled ranks held-out pairs better than chance. A part of
# what it learns is length.
#
# **Source.** Bai et al. 2022 (arXiv 2204.05862) for the pairs; Singhal et al. 2023 (arXiv
# 2310.03716) for length.
#
# **What was reproduced.** DPO ranks 61% of held-out pairs right, and 59% if lengths are similar.
# It learns that people chose short answers here. Spread: 95% intervals over 5 folds and decoders.
#
# **What was not.** A liking for long answers, and a model that can write: this decoder has one
# layer and knows 1000 words. Settings were checked on 312 pairs that are not reported.
#
# The pairs are `harmless-base/test.jsonl.gz` of `Anthropic/hh-rlhf` on the Hugging Face hub, under
# the licence `MIT`. `--data FILE` says where that file is.

# %%
import argparse
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from shared import entry, intervals, lines, table as tables, training
from shared.words import Words

import dpo_eqx as dpx
from dpo_eqx import data, losses, models


class Case(NamedTuple):
    loss: Callable
    by_token: bool = False  # whether its margins are averages over tokens


CASES = {
    "dpo": Case(functools.partial(losses.dpo, beta=0.1)),
    "dpo, per token": Case(functools.partial(losses.length_normalized(losses.dpo), beta=2.0), True),
}
TOKENIZE = functools.partial(data.tokenize, max_prompt_length=32, max_completion_length=48)
CLOSE = 20  # words that similar lengths differ by


class Size(NamedTuple):
    path: Path
    names: tuple[str, ...] = tuple(CASES)
    rows: int = 2000
    folds: int = 5  # each is held out once
    epochs: tuple[int, int] = (3, 2)  # of the fit to chosen answers, and of each loss


class Results(NamedTuple):
    """For each held-out pair: margins by ranking, and the chosen answer's surplus of words."""

    margins: dict[str, np.ndarray]  # (folds, pairs)
    longer: np.ndarray  # (folds, pairs)


# %%
SCORE = eqx.filter_jit(dpx.score_pairs)


def scores(policy, rows) -> dpx.PairLogProbs:
    """The log-probabilities of all rows in their order."""
    batches = data.batches(rows, batch_size=training.ROWS, shuffle=False, buckets=1)
    found = [SCORE(policy, batch) for batch in batches]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *found)


def margin(found: dpx.PairLogProbs, by_token: bool = False) -> np.ndarray:
    sums = np.array([found.chosen, found.rejected])
    lengths = np.array([found.chosen_length, found.rejected_length])
    return np.subtract(*(sums / lengths if by_token else sums))


def run(size: Size, train_on: list[dict], held_out: list[dict], seed: int) -> dict[str, np.ndarray]:
    """Fits a decoder to chosen answers, trains it by each loss, and ranks held-out pairs."""
    words = Words(record["chosen"] for record in train_on)
    rows, unseen = (TOKENIZE(part, words)[0] for part in (train_on, held_out))
    config = models.Config(vocab=words.vocab_size, width=64, layers=1, heads=4, tied=True)
    new = models.Transformer(config, key=jax.random.key(seed))
    fit, train = ({"rows": rows, "epochs": n, "seed": seed} for n in size.epochs)
    fitted = training.on_rows(losses.sft, new, rate=3e-3, **fit)
    before = scores(fitted, unseen)
    margins = {"the shorter answer": -longer(held_out), "likelihood before": margin(before)}
    for name in size.names:
        loss, by_token = CASES[name]
        after = scores(training.on_rows(loss, fitted, rate=1e-3, **train), unseen)
        margins[name] = margin(after, by_token) - margin(before, by_token)
    return margins


def longer(records: list[dict]) -> np.ndarray:
    """How many words the chosen answer has more than the rejected one."""
    chosen, rejected = ([len(Words.split(x[y])) for x in records] for y in ("chosen", "rejected"))
    return np.subtract(chosen, rejected)


def compute(size: Size) -> Results:
    records = list(data.read(size.path))
    records = random.Random(0).sample(records, len(records))[: size.rows]
    parts = [records[fold :: size.folds] for fold in range(size.folds)]
    rest = [[x for y in parts if y is not part for x in y] for part in parts]
    runs = [run(size, *both, seed) for seed, both in enumerate(zip(rest, parts, strict=True))]
    margins = {name: np.stack([x[name] for x in runs]) for name in runs[0]}
    return Results(margins, np.stack([longer(part) for part in parts]))


# %%
def accuracy(results: Results, name: str, where: np.ndarray) -> np.ndarray:
    """The share of the pairs `where` whose chosen answer is first, by fold; a tie is one half."""
    return np.average((np.sign(results.margins[name]) + 1) / 2, axis=1, weights=where)


def table(results: Results) -> str:
    header = ["ranked by", "all pairs", "similar length", "chosen is longer", "chosen is shorter"]
    rows, longer = [], results.longer
    kinds = np.ones_like(longer), abs(longer) <= CLOSE, longer > 0, longer < 0
    for name, margins in results.margins.items():
        ranks = [stats.spearmanr(x, y)[0] for x, y in zip(margins, longer, strict=True)]
        columns = [*(accuracy(results, name, kind) for kind in kinds), np.array(ranks)]
        rows.append([name, *map(intervals.as_text, columns)])
    return tables.markdown([*header, "with length"], rows)


def picture(results: Results) -> Figure:
    figure, names = Figure(figsize=(12, 4), layout="constrained"), list(results.margins)[1:]
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        axes.scatter(results.longer, results.margins[name], s=3, alpha=0.3, color=lines.COLOURS[0])
        axes.axhline(0, color="k", linewidth=0.5)
        low, high = np.quantile(results.margins[name], (0.002, 0.998))
        axes.set(title=name, xlim=(-150, 150), ylim=(low, high), xlabel="words beyond the rejected")
    figure.axes[0].set_ylabel("margin of the chosen answer (nats; right: per token)")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=Path, default=Path("harmless-base-test.jsonl.gz"))
    full = Size(parser.parse_known_args()[0].data)
    quick = full._replace(folds=2, epochs=(1, 1))
    entry.run("real_pairs", full=full, quick=quick, compute=compute, table=table, picture=picture)
