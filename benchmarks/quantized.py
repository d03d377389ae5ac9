"""Held-out accuracy of the quickstart's task: all weights trained, and adapters on an nf4 base.

    python -m benchmarks.quantized           # five seeds, about ten minutes on two cores
    python -m benchmarks.quantized 0 1       # two seeds

Each seed has its own grammar split, reference, samples and order. Both ways of training share them
and the held-out pairs. Adapters get three times as many steps.
"""

import random
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import equinox as eqx
import jax
import numpy as np
import quickstart
from support import grammar
from support.exam import CHUNK
from support.tasks import HELD_OUT_PROMPTS, PAIRS, WORDS, encoded, judged_samples
from support.vocabulary import in_chunks, random_batches, take

import dpo_eqx as dpx
from dpo_eqx import models

SETTINGS = quickstart.REVIEWS
RANK = 16
RATE = 3e-3  # ten times the rate of all weights, since adapters begin at zero
# Chosen on seed 4: after these steps the loss on the training pairs equals the loss of all weights.
# After only as many steps as all weights take, it is higher. It is also higher if all weights
# except the embedding's are trained.
STEPS = 3 * SETTINGS.steps


def main(seeds: list[int]) -> None:
    found = []
    for seed in seeds:
        reference, pairs, test = task(seed)
        base = models.quantize(reference, "nf4")
        small = models.add_lora(base, rank=RANK, key=jax.random.key(seed))
        settings = {"trainable": models.lora_filter(small), "reference_of": models.without_lora}
        full = train(dpx.snapshot(reference), reference, pairs, seed, SETTINGS.rate, SETTINGS.steps)
        nf4 = train(small, None, pairs, seed, RATE, STEPS, **settings)
        found.append([accuracy(full, reference, test), accuracy(nf4, base, test)])
        print(f"seed {seed}: all weights {found[-1][0]:.3f}, nf4 and adapters {found[-1][1]:.3f}")
    for name, values in zip(("all weights", "nf4 and adapters"), np.array(found).T, strict=True):
        print(f"{name}: {values.mean():.3f}, spread {values.min():.3f} to {values.max():.3f}")


def task(seed: int):
    """The fitted reference, and judged pairs to train on and to hold out, as the quickstart's."""
    rng = random.Random(seed)
    keys = jax.random.split(jax.random.key(seed), 3)
    prompts = grammar.all_prompts()
    rng.shuffle(prompts)
    new, known = prompts[:HELD_OUT_PROMPTS], prompts[HELD_OUT_PROMPTS:]
    widths = SETTINGS.widths
    asked = rng.choices(known, k=SETTINGS.fit_steps * SETTINGS.fit_batch)
    answers = [grammar.write_review(prompt, rng).encode() for prompt in asked]
    texts = WORDS.texts(encoded(asked), answers, widths)
    reference = quickstart.fit(texts, WORDS, SETTINGS, seed=seed)
    sets = []
    for choices, count, key in (
        (known, PAIRS, keys[0]),
        (new, SETTINGS.held_out, keys[1]),
    ):
        asked = rng.choices(choices, k=count)
        pairs, _ = judged_samples(reference, widths, asked, rng, key)
        sets.append(WORDS.pairs(pairs, widths))
    return reference, *sets


def train(policy, reference, pairs, seed: int, rate: float, steps: int, **settings):
    """DPO with the quickstart's settings, except the learning rate and the number of steps."""
    optimizer = quickstart.schedule(rate, steps)
    loss = partial(dpx.losses.dpo, beta=SETTINGS.beta)
    step = eqx.filter_jit(dpx.make_step(loss, optimizer, **settings))
    trainable = settings.get("trainable", eqx.is_inexact_array)
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    for rows in random_batches(pairs.pairs, SETTINGS.batch, steps, seed):
        policy, opt_state, _ = step(policy, opt_state, take(pairs, rows), reference)
    return policy


def accuracy(policy, reference, test) -> float:
    """The share of held-out pairs that the implicit reward ranks as the labeller did."""
    evaluate = eqx.filter_jit(dpx.make_eval(partial(dpx.losses.dpo, beta=SETTINGS.beta)))
    parts = [evaluate(policy, chunk, reference) for chunk in in_chunks(test, CHUNK)]
    return float(sum(parts[1:], start=parts[0]).mean()["rewards/accuracies"])


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or list(range(5)))
