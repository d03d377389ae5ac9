"""Online DPO, on pairs that the policy writes, beside offline DPO, on pairs of the reference.

Task, reader and settings are the quickstart's. Both runs start from the same reference and get the
same number of labels. The picture shows gold reward against KL to the reference.
"""

import argparse
import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import quickstart
from quickstart import REVIEWS
from support import grammar, show
from support.exam import Metrics, best_possible, kl
from support.options import checked, positive
from support.tasks import HELD_OUT_PROMPTS, WORDS, encoded
from support.token_reward import gold_reward
from support.vocabulary import take

import dpo_eqx as dpx
from dpo_eqx import models

SAMPLES = 40  # of each held-out prompt in an evaluation


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits a reference, trains from it in both ways, and draws the picture."""
    options = parse(arguments)
    show.say_what_is_missing()
    rng = random.Random(options.seed)
    texts = rng.sample(grammar.all_prompts(), len(grammar.all_prompts()))
    reference = fit(texts[HELD_OUT_PROMPTS:], rng, options)
    held_out, prompts = as_tokens(texts[:HELD_OUT_PROMPTS]), as_tokens(texts[HELD_OUT_PROMPTS:])
    for_looks, for_rounds, for_frontier = jax.random.split(jax.random.key(options.seed), 3)
    exam = partial(look, reference=reference, prompt=held_out, key=for_looks)
    optimizer = quickstart.schedule(REVIEWS.rate, options.rounds)
    train = partial(
        improve,
        reference,
        optimizer.init(eqx.filter(reference, eqx.is_inexact_array)),
        one_round=make_round(optimizer),
        prompts=prompts,
        exam=exam,
        keys=jax.random.split(for_rounds, options.rounds),
    )
    runs = {"offline": train(is_online=False), "online": train(is_online=True)}
    show.say(
        f"\n{options.rounds * REVIEWS.batch} labels in each run. On {SAMPLES} samples for each of "
        f"{HELD_OUT_PROMPTS}\nprompts that nothing was trained on, with 95% intervals:\n"
    )
    show.say(show.beside({"reference": runs["online"][0]} | {n: x[-1] for n, x in runs.items()}))
    drawn = draw(reference, held_out, 8 * SAMPLES, for_frontier)
    frontier = best_possible(np.ravel(gold_reward(held_out, drawn.tokens)))
    show.gold_picture(options.output, runs, frontier)


def fit(prompts: Sequence[str], rng: random.Random, options) -> models.Transformer:
    """The quickstart's reference: a decoder that writes reviews as the grammar does."""
    settings = dataclasses.replace(REVIEWS, fit_steps=options.fit_steps)
    asked = rng.choices(prompts, k=settings.fit_steps * settings.fit_batch)
    written = [grammar.write_review(prompt, rng).encode() for prompt in asked]
    texts = WORDS.texts(encoded(asked), written, settings.widths)
    return quickstart.fit(texts, WORDS, settings, seed=options.seed)


def make_round(optimizer: optax.GradientTransformation) -> Callable:
    """A round of training in one jitted function: draw, judge, pair, and take a step."""
    step = dpx.make_step(partial(dpx.losses.dpo, beta=REVIEWS.beta), optimizer)

    @eqx.filter_jit
    def one_round(writer, policy, opt_state, prompts, reference, key):
        for_prompts, for_draws, for_reader = jax.random.split(key, 3)
        rows = jax.random.permutation(for_prompts, len(prompts.ids))[: REVIEWS.batch]
        prompt = take(prompts, rows)
        samples = draw(writer, prompt, 2, for_draws)
        rewards = gold_reward(prompt, samples.tokens)
        # With this noise the reader prefers as the Bradley-Terry model says.
        noise = jax.random.gumbel(for_reader, rewards.shape)
        batch = dpx.pair_samples(prompt, samples, rewards + noise)
        policy, opt_state, metrics = step(policy, opt_state, batch, reference)
        return policy, opt_state, metrics | {"gold": rewards.mean()}

    return one_round


def improve(
    reference: models.Transformer,
    opt_state: optax.OptState,
    *,
    one_round: Callable,
    prompts: dpx.Tokens,
    exam: Callable[[models.Transformer], Metrics],
    keys: jax.Array,
    is_online: bool,
) -> list[Metrics]:
    """DPO from the reference, a round for each key. Returns the metrics of each evaluation."""
    policy, looks, rounds = reference, [exam(reference)], len(keys)
    with show.progress("online" if is_online else "offline", rounds) as tell:
        for number, key in enumerate(keys, 1):
            # The only difference between the runs: who writes the completions.
            writer = policy if is_online else reference
            policy, opt_state, metrics = one_round(
                writer, policy, opt_state, prompts, reference, key
            )
            tell(number, f"loss {metrics['loss']:.3f}  gold reward {metrics['gold']:+.2f}")
            if number % math.ceil(rounds / REVIEWS.looks) == 0 or number == rounds:
                looks.append(exam(policy))
    return looks


def draw(policy, prompt: dpx.Tokens, samples: int, key: jax.Array) -> models.Samples:
    """Several completions of each prompt."""
    width = REVIEWS.widths.completion
    return models.sample(
        policy, prompt, samples=samples, max_new_tokens=width, key=key, eos=WORDS.end
    )


def look(
    policy: models.Transformer,
    *,
    reference: models.Transformer,
    prompt: dpx.Tokens,
    key: jax.Array,
) -> Metrics:
    """The KL and the gold reward of fresh samples, with standard errors."""
    drawn = draw(policy, prompt, SAMPLES, key)
    rewards = gold_reward(prompt, drawn.tokens)
    # As rows of one batch, each beside its prompt.
    rows = dpx.label_samples(prompt, drawn, rewards, threshold=0.0)
    found = {"kl": kl(policy, reference, rows.prompt, rows.completion), "gold": rewards}
    means = {name: float(x.mean()) for name, x in found.items()}
    return means | {f"{name}_error": float(x.std()) / x.size**0.5 for name, x in found.items()}


def as_tokens(prompts: Sequence[str]) -> dpx.Tokens:
    """Prompts as JAX arrays."""
    return jax.tree.map(jnp.asarray, WORDS.prompts(encoded(prompts), REVIEWS.widths.prompt))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="Random seed (%(default)s).")
    parser.add_argument(
        "--rounds", type=positive, default=REVIEWS.steps, help="Rounds of each run (%(default)s)."
    )
    parser.add_argument(
        "--fit-steps",
        type=positive,
        default=REVIEWS.fit_steps,
        help="Number of steps to fit the reference (%(default)s).",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("online.png"),
        help="File for the picture (%(default)s).",
    )
    return checked(parser, arguments)


if __name__ == "__main__":
    main()
