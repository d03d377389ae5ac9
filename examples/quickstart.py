"""Direct Preference Optimization of a small decoder, from nothing to a picture.

Without options, the task is reviews with a known gold reward, so that you can see whether DPO
raises what it should. With `--data FILE`, it is the preference pairs of a JSON Lines file.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import show
from support.exam import Exam, Metrics
from support.options import parse
from support.tasks import make_task
from support.vocabulary import Vocabulary, Widths, random_batches, take

import dpo_eqx as dpx
from dpo_eqx import models

# The policy
SIZES = {
    "width": 128,
    "layers": 2,  # the fewest that can look up a word and use it
    "heads": 4,  # of 32 each
    "feed_forward": 384,  # three times the width
    "tied": True,  # embedding and unembedding are one table
}
FIT_RATE = 3e-3  # of Adam, at the peak; high, since the model is small and new


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that depend on the data; `REVIEWS` and `FILE` explain each."""

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
    fit_steps=300,  # until the loss is flat, at the entropy of the grammar
    fit_batch=64,
    beta=0.3,  # pull towards the reference: 0.1 to 0.5 is usual, more stays nearer
    steps=160,  # five epochs; watch the KL
    batch=64,  # pairs
    rate=3e-4,  # of Adam; a tenth of the rate of the fit: at 1e-3 sentences break
    looks=8,  # evaluations during DPO
    held_out=512,  # pairs: accuracy to within 0.04
    samples=512,  # written at each evaluation, for gold reward and KL
)
FILE = Settings(
    widths=Widths(prompt=96, completion=96),  # bytes; the cost grows with them
    fit_steps=120,  # enough for spelling, too few for sense
    fit_batch=16,  # rows are long, so a batch has fewer of them
    beta=0.1,
    steps=120,  # about one epoch of 2000 pairs
    batch=16,
    rate=1e-4,  # lower than above, since few pairs are soon learned by heart
    looks=4,
    held_out=256,  # pairs, or a fifth if there are few: accuracy to within 0.06
    samples=64,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the quickstart. The exit status is 2 if `--data` gives nothing to train on."""
    options = parse(__doc__, arguments)
    show.say_what_is_missing()
    changed = {"steps": options.steps, "fit_steps": options.fit_steps}
    changed = {name: value for name, value in changed.items() if value is not None}
    settings = dataclasses.replace(FILE if options.data else REVIEWS, **changed)
    try:
        task = make_task(options.data, settings, seed=options.seed)
    except (OSError, ValueError) as error:
        print(f"--data: {error}", file=sys.stderr)
        return 2

    reference = fit(task.texts, task.vocabulary, settings, seed=options.seed)
    train, test = task.pairs(reference)
    pairs, held_out = (task.vocabulary.pairs(side, task.widths) for side in (train, test))
    exam = Exam(reference, held_out, task, beta=settings.beta)
    policy, history, looks = improve(reference, pairs, exam, settings, seed=options.seed)

    show.say(f"\n{task.describe(len(test))}\n")
    show.say(show.report(looks, len(test)))
    task.show_samples(exam, reference, policy)
    show.picture(options.output, history, looks, task.frontier())
    return 0


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


def likelihood(policy: dpx.UnpairedLogProbs, reference: None) -> dpx.UnpairedLoss:
    """The negative log-probability of a completion. Your own loss can have the same form."""
    log_prob = jnp.asarray(policy.completion)
    return dpx.UnpairedLoss(-log_prob, log_prob)


def improve(
    reference: models.Transformer,
    pairs: dpx.PreferenceBatch,
    exam: Exam,
    settings: Settings,
    *,
    seed: int,
) -> tuple[models.Transformer, list[Metrics], list[Metrics]]:
    """DPO from the reference.

    Returns the policy, the metrics of each step, and the metrics of each evaluation.
    """
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
    """Takes a step on each batch of rows of `data`: the loop that you would write.

    Returns the policy and the metrics of every step. The argument `policy` is donated.
    """

    # The policy and the optimiser's state are updated in place; `frozen` is used again.
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
            tell(number, show.summary(history[-1]))
            watch(number, policy)
    return policy, history


def schedule(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam whose rate rises for a tenth of the steps and then falls to 0."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))


if __name__ == "__main__":
    sys.exit(main())
