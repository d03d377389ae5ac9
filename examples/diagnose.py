"""Mislabelled preferences found by what DPO makes of each pair: planted, so that one can count.

On the task of the quickstart, whose reader errs too; what is planted comes on top of that.
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
PLANTED = 0.1  # the share of labels that are turned round
BETA = 0.1  # a loose hold on the reference: the policy is to learn, not to be used
STEPS = 320  # ten epochs: enough to learn what most labels say, not each of them by heart
RATE = 1e-3  # higher than one would train with, for the same reason
CHUNK = 64  # pairs at once


class Found(NamedTuple):
    """How many pairs were suspected, and how right that was."""

    suspects: int
    precision: float
    recall: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits a reference, plants wrong labels, runs DPO on all of it, and looks at the margins."""
    options = parse(arguments)
    pairs, reference = judged_pairs(options.seed, options.fit_steps)
    labelled, is_planted = plant(pairs, PLANTED, seed=options.seed)
    show.say(f"{is_planted.sum()} of {len(pairs)} labels are turned round.")
    batch = WORDS.pairs(labelled, REVIEWS.widths)
    policy = learn(reference, batch, steps=options.steps, seed=options.seed)
    diagnosis, sides = examine(policy, reference, batch)
    margin = np.asarray(diagnosis.margin)
    report(margin, is_planted, against_gold(labelled))
    show.say(
        "\nThe three most suspect pairs, and what each word of theirs adds to the log-ratio:\n"
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
    """The pairs with chosen and rejected exchanged in a share of them, and in which."""
    count = round(share * len(pairs))
    is_planted = np.arange(len(pairs)) < count
    np.random.default_rng(seed).shuffle(is_planted)
    turned = [
        Pair(pair.prompt, pair.rejected, pair.chosen) if wrong else pair
        for pair, wrong in zip(pairs, is_planted, strict=True)
    ]
    return turned, is_planted


def learn(
    reference: models.Transformer, batch: dpx.PreferenceBatch, *, steps: int, seed: int
) -> models.Transformer:
    """DPO on all pairs, the wrong ones among them."""
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
    """Margins and the like of every pair, and what each token adds."""

    @eqx.filter_jit
    def on(policy, reference, batch):
        sides = dpx.compare(policy, reference, batch)
        loss = partial(dpx.losses.dpo, beta=BETA)
        return dpx.diagnose(loss, sides.policy, sides.reference), sides

    parts = [on(policy, reference, chunk) for chunk in in_chunks(batch, CHUNK)]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return jax.tree.map(lambda x: x[: batch.pairs], joined)


def find(suspected: np.ndarray, is_wrong: np.ndarray) -> Found:
    """Precision and recall of a suspicion."""
    right = (suspected & is_wrong).sum()
    suspects = int(suspected.sum())
    return Found(suspects, right / max(suspects, 1), right / max(is_wrong.sum(), 1))


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """True at the `count` lowest values."""
    return np.argsort(np.argsort(values, kind="stable")) < count


def against_gold(pairs: Sequence[Pair]) -> np.ndarray:
    """Whether the gold reward prefers what was rejected: planted, or the reader's own error."""
    return np.array(
        [
            gold(pair.prompt.decode(), pair.chosen) < gold(pair.prompt.decode(), pair.rejected)
            for pair in pairs
        ]
    )


def report(margin: np.ndarray, is_planted: np.ndarray, is_wrong: np.ndarray) -> None:
    """A table of precision and recall, for planted labels and for all that gold disagrees with."""
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
    show.say("\n* of all labels that the gold reward disagrees with, the reader's own errors too")


def in_words(
    pair: Pair, batch: dpx.PreferenceBatch, sides: dpx.Comparison, place: int, margin: float
) -> str:
    """A pair with its margin, gold rewards, and the log-ratio of each word."""
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
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--steps", type=positive, default=STEPS, help="of DPO (%(default)s)")
    parser.add_argument(
        "--fit-steps",
        type=positive,
        default=REVIEWS.fit_steps,
        help="of the reference (%(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
