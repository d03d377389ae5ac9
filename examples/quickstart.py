"""Direct Preference Optimisation of a small byte-level decoder, from nothing to a picture.

Without options on reviews with a known gold reward, so that one sees whether DPO raises what it
should; with `--data FILE` on the preference pairs of a JSON Lines file.
"""

import argparse
import dataclasses
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import preference_file
import reviews
import show
from exam import Exam, Metrics, best_possible, draw
from vocabulary import BYTES, Pair, Vocabulary, Widths, take

import dpo_eqx as dpx
from dpo_eqx import models

# The policy
SIZES = {
    "width": 128,
    "layers": 2,  # the least that can look up a word and use it
    "heads": 4,  # of 32 each
    "feed_forward": 384,  # three times the width
    "tied": True,  # embedding and unembedding are one table
}
FIT_RATE = 3e-3  # of Adam, at the peak; high, since the model is small and new


@dataclasses.dataclass(frozen=True)
class Settings:
    """What depends on the data."""

    widths: Widths
    fit_steps: int
    fit_batch: int
    beta: float
    steps: int
    batch: int
    rate: float
    looks: int
    held_out: int
    samples: int


REVIEWS = Settings(
    widths=Widths(prompt=4, completion=8),  # the longest of the grammar, end token included
    fit_steps=300,  # until the loss is flat, at what the grammar leaves to chance
    fit_batch=64,
    beta=0.3,  # how hard to hold on to the reference: 0.1 to 0.5 is usual, more is nearer
    steps=160,  # some epochs; watch the KL
    batch=64,  # pairs
    rate=3e-4,  # of Adam; a tenth of what fitted the reference: at 1e-3 sentences break
    looks=8,  # evaluations on the way
    held_out=512,  # pairs: accuracy to within 0.04
    samples=512,  # written at each look, for gold reward and KL
)
PAIRS = 2048  # to train on: labels are noisy, and fewer are learnt by heart
HELD_OUT_PROMPTS = 24  # of 96; in nothing that anything is trained on
WORDS = Vocabulary([word.encode() for word in reviews.words()], rb" [a-z]+|The|\.")

FILE = Settings(
    widths=Widths(prompt=96, completion=96),  # bytes; the cost grows with them
    fit_steps=120,  # a short while: enough for spelling, not for sense
    fit_batch=16,  # long rows, so fewer of them
    beta=0.1,
    steps=120,  # about one epoch of 2000 pairs
    batch=16,
    rate=1e-4,  # lower than above: few pairs and much to learn by heart
    looks=4,
    held_out=256,  # pairs, or a fifth where there are few: accuracy to within 0.06
    samples=64,
)


def optimise(
    step: Callable,
    optimizer: optax.GradientTransformation,
    policy: models.Transformer,
    data: dpx.PreferenceBatch | dpx.UnpairedBatch,
    reference: models.Transformer | None = None,
    *,
    batches: Sequence[np.ndarray],
    title: str,
    watch: Callable[[int, models.Transformer], None] = lambda number, policy: None,
) -> tuple[models.Transformer, list[Metrics]]:
    """A step on each batch, rows of `data`: the loop that a user writes.

    Returns the policy and the metrics of every step. The policy that came in is used up.
    """

    # The policy and the optimiser's state are updated in place; what is `frozen` is kept.
    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference = frozen
        return step(policy, opt_state, batch, reference)

    opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    history = []
    with show.progress(title, len(batches)) as tell:
        for number, rows in enumerate(batches, 1):
            frozen = take(data, rows), reference
            policy, opt_state, metrics = train(frozen, policy, opt_state)
            history.append({name: float(value) for name, value in metrics.items()})
            tell(number, summary(history[-1]))
            watch(number, policy)
    return policy, history


def summary(metrics: Metrics) -> str:
    """The metrics of a step that its line has room for."""
    names = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    return "  ".join(f"{names[key]} {metrics[key]:.3f}" for key in names if key in metrics)


def schedule(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam whose rate rises for a tenth of the steps and then falls to 0."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))


def random_batches(count: int, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each batch, one epoch after the other, each in a new order."""
    rng = np.random.default_rng(seed)
    size = min(size, count)
    epochs = -(-steps * size // count)
    rows = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    return np.split(rows[: steps * size], steps)


def likelihood(policy: dpx.UnpairedLogProbs, reference: None) -> dpx.UnpairedLoss:
    """The negative log-probability of a completion: a loss of one's own drops in like any other."""
    log_prob = jnp.asarray(policy.completion)
    return dpx.UnpairedLoss(-log_prob, log_prob)


def fit(
    texts: dpx.UnpairedBatch, vocabulary: Vocabulary, settings: Settings, *, seed: int
) -> models.Transformer:
    """A new decoder, fitted to the completions by maximum likelihood."""
    policy = models.Transformer(
        models.Config(vocab=vocabulary.size, **SIZES), key=jax.random.key(seed)
    )
    size = sum(x.size for x in jax.tree.leaves(eqx.filter(policy, eqx.is_array)))
    show.say(f"The reference: a decoder of {size:,} parameters, fitted by maximum likelihood.")
    optimizer = schedule(FIT_RATE, settings.fit_steps)
    step = dpx.make_step(
        likelihood,
        optimizer,
        score=dpx.score_unpaired,
        metrics=lambda *scored: {"loss": scored[-1].loss},
    )
    batches = random_batches(texts.pairs, settings.fit_batch, settings.fit_steps, seed)
    return optimise(step, optimizer, policy, texts, batches=batches, title="fit")[0]


def improve(
    reference: models.Transformer,
    pairs: dpx.PreferenceBatch,
    exam: Exam,
    settings: Settings,
    *,
    seed: int,
) -> tuple[models.Transformer, list[Metrics], list[Metrics]]:
    """DPO, beginning at the reference: the policy, metrics of each step, and of each look."""
    steps, beta, size = settings.steps, settings.beta, min(settings.batch, pairs.pairs)
    show.say(f"DPO on {pairs.pairs} pairs, beta {beta}: {steps} steps of {size}.")
    looks = [{"step": 0, **exam.look(reference)}]

    def watch(number: int, policy: models.Transformer) -> None:
        if number % math.ceil(steps / settings.looks) == 0 or number == steps:
            looks.append({"step": number, **exam.look(policy)})

    optimizer = schedule(settings.rate, steps)
    step = dpx.make_step(partial(dpx.losses.dpo, beta=beta), optimizer)
    policy = dpx.snapshot(reference)  # a copy, since it is donated and the reference is not
    batches = random_batches(pairs.pairs, size, steps, seed)
    policy, history = optimise(
        step, optimizer, policy, pairs, reference, batches=batches, title="DPO", watch=watch
    )
    return policy, history, looks


def learn_reviews(settings: Settings, *, seed: int, output: Path) -> None:
    """Fits a reference to the grammar, has its samples judged by gold reward, and runs DPO."""
    rng = random.Random(seed)
    keys = jax.random.split(jax.random.key(seed), 3)
    prompts = reviews.all_prompts()
    rng.shuffle(prompts)
    new, known = prompts[:HELD_OUT_PROMPTS], prompts[HELD_OUT_PROMPTS:]

    widths = settings.widths
    asked = rng.choices(known, k=settings.fit_steps * settings.fit_batch)
    answers = [reviews.write_review(prompt, rng).encode() for prompt in asked]
    texts = WORDS.texts(encoded(asked), answers, widths)
    reference = fit(texts, WORDS, settings, seed=seed)

    pairs, rewards = judged_samples(reference, widths, rng.choices(known, k=PAIRS), rng, keys[0])
    test, test_rewards = judged_samples(
        reference, widths, rng.choices(new, k=settings.held_out), rng, keys[1]
    )
    asked = [new[i % len(new)] for i in range(settings.samples)]
    exam = Exam(
        reference,
        WORDS.pairs(test, widths),
        WORDS.prompts(encoded(asked), widths.prompt),
        WORDS,
        beta=settings.beta,
        key=keys[2],
        gold=lambda texts: [gold(*pair) for pair in zip(asked, texts, strict=True)],
    )
    data = WORDS.pairs(pairs, widths)
    policy, history, looks = improve(reference, data, exam, settings, seed=seed)

    show.say(
        f"\nOn {len(test)} held-out pairs and {len(asked)} fresh samples, of {len(new)} prompts"
    )
    show.say("that nothing was trained on, with 95% intervals:\n")
    show.say(show.report(looks, len(test)))
    ceiling = np.mean((1 + np.sign(test_rewards[:, 0] - test_rewards[:, 1])) / 2)
    show.say(f"\nThe labels are noisy: the gold reward itself ranks {ceiling:.2f} of them right.\n")
    before, after = (exam.write(model) for model in (reference, policy))
    for prompt, *texts in list(zip(asked, before, after, strict=True))[:3]:
        for name, text in zip(("before", "after"), texts, strict=True):
            show.say(f"  {name:6}  {gold(prompt, text):+.2f}  {prompt}{plain(text)}")
    frontier = best_possible(np.concatenate([rewards, test_rewards]).ravel())
    show.picture(output, history, looks, frontier)


def judged_samples(
    reference: models.Transformer,
    widths: Widths,
    prompts: Sequence[str],
    rng: random.Random,
    key: jax.Array,
) -> tuple[list[Pair], np.ndarray]:
    """Two samples of the reference for each prompt, and which of them a simulated reader prefers.

    Returns the pairs, and the gold rewards of chosen and rejected, of shape `(pairs, 2)`.
    """
    asked = WORDS.prompts(encoded(prompts), widths.prompt)
    drawn = [
        WORDS.decode(draw(reference, asked, width=widths.completion, key=key, end=WORDS.end))
        for key in jax.random.split(key)
    ]
    pairs, rewards = [], []
    for prompt, *texts in zip(prompts, *drawn, strict=True):
        worth = [gold(prompt, text) for text in texts]
        order = (0, 1) if reviews.prefers_first(worth[0], worth[1], rng) else (1, 0)
        pairs.append(Pair(prompt.encode(), *(texts[i] for i in order)))
        rewards.append([worth[i] for i in order])
    return pairs, np.array(rewards)


def gold(prompt: str, completion: bytes) -> float:
    """The gold reward of what a policy wrote."""
    return reviews.gold_reward(prompt, completion.decode(errors="replace"))


def encoded(texts: Sequence[str]) -> list[bytes]:
    """Texts as bytes."""
    return [text.encode() for text in texts]


def plain(text: bytes) -> str:
    """Text that cannot move the cursor of a terminal."""
    return text.decode(errors="replace").encode("unicode_escape").decode()


def usable_pairs(path: Path, widths: Widths) -> list[Pair]:
    """The pairs of a file, having told what became of each of its lines.

    **Raises:**

    `OSError` where it cannot be read, `ValueError` where it has fewer than two such pairs.
    """
    reading = preference_file.read_pairs(path)
    for line in preference_file.faults(path, reading):
        print(line, file=sys.stderr)
    pairs, account = preference_file.usable(reading, widths)
    show.say(f"{path}: {account}")
    if len(pairs) < 2:
        raise ValueError(
            f"{path} must hold at least 2 usable pairs, one to train on and one to hold "
            f"out; it holds {len(pairs)}. A line is an object with the texts `prompt`, `chosen` "
            "and `rejected`, or `chosen` and `rejected` that begin alike."
        )
    return pairs


def learn_pairs(pairs: list[Pair], settings: Settings, *, seed: int, output: Path) -> None:
    """Fits a reference to the chosen texts of all pairs but those held out, and runs DPO."""
    widths = settings.widths
    pairs = random.Random(seed).sample(pairs, len(pairs))
    held_out = min(settings.held_out, max(1, len(pairs) // 5))
    test, train = pairs[:held_out], pairs[held_out:]
    show.say(f"{len(train)} pairs are trained on, {len(test)} held out.")

    prompts, chosen, _ = zip(*train, strict=True)
    texts = BYTES.texts(prompts, chosen, widths)
    reference = fit(texts, BYTES, settings, seed=seed)
    asked = [pair.prompt for pair in test[: settings.samples]]
    exam = Exam(
        reference,
        BYTES.pairs(test, widths),
        BYTES.prompts(asked, widths.prompt),
        BYTES,
        beta=settings.beta,
        key=jax.random.key(seed),
    )
    data = BYTES.pairs(train, widths)
    _, history, looks = improve(reference, data, exam, settings, seed=seed)
    show.say(f"\nOn {len(test)} held-out pairs and {len(asked)} fresh samples, 95% intervals:\n")
    show.say(show.report(looks, len(test)))
    show.picture(output, history, looks)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="JSON Lines, gzip too: prompt, chosen, rejected; or the last two"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument(
        "--steps", type=positive, help=f"of DPO ({REVIEWS.steps}; {FILE.steps} on a file)"
    )
    parser.add_argument(
        "--fit-steps",
        type=positive,
        help=f"of the reference ({REVIEWS.fit_steps}; {FILE.fit_steps})",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart.png"), help="picture (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if not options.output.parent.is_dir():  # said now, not after the work
        parser.error(f"--output: there is no folder {options.output.parent} to put it in")
    return options


def positive(text: str) -> int:
    """A number of steps."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job. The exit status is 2 where `--data` gives nothing to train on."""
    options = parse(arguments)
    show.say_what_is_missing()
    changed = {"steps": options.steps, "fit_steps": options.fit_steps}
    changed = {name: value for name, value in changed.items() if value is not None}
    settings = dataclasses.replace(REVIEWS if options.data is None else FILE, **changed)
    if options.data is None:
        learn_reviews(settings, seed=options.seed, output=options.output)
        return 0
    try:
        pairs = usable_pairs(options.data, settings.widths)
    except (OSError, ValueError) as error:
        print(f"--data: {error}", file=sys.stderr)
        return 2
    learn_pairs(pairs, settings, seed=options.seed, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
