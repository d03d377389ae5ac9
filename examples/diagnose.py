"""Finds mislabelled preferences by DPO's margins; the wrong labels are planted, so one can count.

The task is the quickstart's. Its simulated reader makes mistakes too, in addition to the planted.
"""

import argparse
import dataclasses
import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
import quickstart
from quickstart import REVIEWS
from support import grammar, show
from support.options import positive
from support.tasks import WORDS, encoded, gold, judged_samples
from support.vocabulary import Pair, in_chunks, random_batches

import dpo_eqx as dpx
from dpo_eqx import models

PAIRS = 2048
PLANTED = 0.1  # fraction of labels that are flipped
BETA = 0.1  # a weak pull towards the reference: the policy should learn, nobody will use it
STEPS = 320  # ten epochs: enough to learn the majority of labels, too few to learn each by heart
RATE = 1e-3  # higher than in normal training, for the same reason
CHUNK = 64  # pairs evaluated at once


class Found(NamedTuple):
    """The number of suspected pairs, and the precision and recall of the suspicion."""

    suspects: int
    precision: float
    recall: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits a reference, plants wrong labels, runs DPO on all pairs, and examines the margins."""
    options = parse(arguments)
    pairs, reference = judged_pairs(options.seed, options.fit_steps)
    labelled, is_planted = plant(pairs, PLANTED, seed=options.seed)
    show.say(f"{is_planted.sum()} of {len(pairs)} labels are flipped.")
    batch = WORDS.pairs(labelled, REVIEWS.widths)
    policy = learn(reference, batch, steps=options.steps, seed=options.seed)
    diagnosis, sides = examine(policy, reference, batch)
    margin = np.asarray(diagnosis.margin)
    report(margin, is_planted, against_gold(labelled))
    show.say(
        "\nThe three most suspect pairs, and what each of their words adds to the log-ratio:\n"
    )
    for place in np.argsort(margin)[:3]:
        show.say(in_words(labelled[place], batch, sides, int(place), float(margin[place])))


def judged_pairs(seed: int, fit_steps: int) -> tuple[list[Pair], models.Transformer]:
    """Two samples of a new reference for each prompt, labelled by the noisy reader."""
    rng = random.Random(seed)
    prompts = grammar.all_prompts()
    asked = rng.choices(prompts, k=fit_steps * REVIEWS.fit_batch)
    answers = [grammar.write_review(prompt, rng).encode() for prompt in asked]
    texts = WORDS.texts(encoded(asked), answers, REVIEWS.widths)
    settings = dataclasses.replace(REVIEWS, fit_steps=fit_steps)
    reference = quickstart.fit(texts, WORDS, settings, seed=seed)
    asked = rng.choices(prompts, k=PAIRS)
    key = jax.random.key(seed)
    return judged_samples(reference, REVIEWS.widths, asked, rng, key)[0], reference


def plant(pairs: Sequence[Pair], share: float, *, seed: int) -> tuple[list[Pair], np.ndarray]:
    """The pairs, with chosen and rejected swapped in a share of them, and a mask of that share."""
    count = round(share * len(pairs))
    is_planted = np.arange(len(pairs)) < count
    np.random.default_rng(seed).shuffle(is_planted)
    labelled = [
        Pair(pair.prompt, pair.rejected, pair.chosen) if wrong else pair
        for pair, wrong in zip(pairs, is_planted, strict=True)
    ]
    return labelled, is_planted


def learn(
    reference: models.Transformer, batch: dpx.PreferenceBatch, *, steps: int, seed: int
) -> models.Transformer:
    """The policy after DPO on all pairs, which include the wrong ones."""
    optimizer = quickstart.schedule(RATE, steps)
    step = dpx.make_step(partial(dpx.losses.dpo, beta=BETA), optimizer)
    batches = random_batches(batch.pairs, REVIEWS.batch, steps, seed)
    policy = dpx.snapshot(reference)
    return quickstart.optimise(
        step, optimizer, policy, batch, reference, batches=batches, title="DPO"
    )[0]


def examine(
    policy: models.Transformer, reference: models.Transformer, batch: dpx.PreferenceBatch
) -> tuple[dpx.Diagnosis, dpx.Comparison]:
    """The diagnosis of every pair, with its margin, and the contribution of each token."""

    @eqx.filter_jit
    def examine_chunk(policy, reference, batch):
        sides = dpx.compare(policy, reference, batch)
        loss = partial(dpx.losses.dpo, beta=BETA)
        return dpx.diagnose(loss, sides.policy, sides.reference), sides

    parts = [examine_chunk(policy, reference, chunk) for chunk in in_chunks(batch, CHUNK)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return jax.tree.map(lambda x: x[: batch.pairs], joined)


def find(suspected: np.ndarray, is_wrong: np.ndarray) -> Found:
    """The precision and recall of a suspicion."""
    right = (suspected & is_wrong).sum()
    suspects = int(suspected.sum())
    return Found(suspects, right / max(suspects, 1), right / max(is_wrong.sum(), 1))


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """True at the `count` lowest values."""
    return np.argsort(np.argsort(values, kind="stable")) < count


def against_gold(pairs: Sequence[Pair]) -> np.ndarray:
    """Whether the gold reward prefers the rejected completion: planted, or the reader's mistake."""
    return np.array(
        [
            gold(pair.prompt.decode(), pair.chosen) < gold(pair.prompt.decode(), pair.rejected)
            for pair in pairs
        ]
    )


def report(margin: np.ndarray, is_planted: np.ndarray, is_wrong: np.ndarray) -> None:
    """Prints precision and recall, for planted labels and for all that the gold reward rejects."""
    planted = int(is_planted.sum())
    rows = []
    for words, suspected in {
        f"the {planted} lowest margins": lowest(margin, planted),
        "every margin below 0": margin < 0,
        "all pairs (chance)": np.ones_like(is_planted),
    }.items():
        of_planted, of_all = find(suspected, is_planted), find(suspected, is_wrong)
        numbers = (of_planted.precision, of_planted.recall, of_all.precision, of_all.recall)
        rows.append([words, str(of_planted.suspects), *(f"{x:.2f}" for x in numbers)])
    header = ["suspects", "pairs", "precision", "recall", "precision*", "recall*"]
    show.say("\n" + show.table(header, rows))
    show.say("\n* for all labels that the gold reward rejects, with the reader's own mistakes")


def in_words(
    pair: Pair, batch: dpx.PreferenceBatch, sides: dpx.Comparison, place: int, margin: float
) -> str:
    """A pair as text, with its margin, its gold rewards, and the log-ratio of each word."""
    prompt = pair.prompt.decode()
    lines = [f"margin {margin:+.2f}  {prompt}"]
    for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        ids = getattr(batch, name).ids[place]
        pieces = [*(piece.decode() for piece in WORDS.pieces), " <end>"]
        ratios = getattr(sides, f"{name}_tokens")[place]
        mask = getattr(batch, name).mask[place]
        words = (f"{pieces[i]} ({r:+.1f})" for i, r in zip(ids[mask], ratios[mask], strict=True))
        lines.append(f"  {name:8}  gold {gold(prompt, text):+.1f} {''.join(words)}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="Random seed (%(default)s).")
    parser.add_argument(
        "--steps", type=positive, default=STEPS, help="Number of DPO steps (%(default)s)."
    )
    parser.add_argument(
        "--fit-steps",
        type=positive,
        default=REVIEWS.fit_steps,
        help="Number of steps to fit the reference (%(default)s).",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
