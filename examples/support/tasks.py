"""The data of the quickstart: texts to fit a reference to, and pairs to train and test on.

A task is either the grammar of reviews, judged by a known gold reward, or a file of pairs.
"""

import abc
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dpo_eqx as dpx
from dpo_eqx import models

from . import grammar, preference_file, show
from .exam import Exam, best_possible, draw
from .vocabulary import BYTES, Pair, Vocabulary, Widths

PAIRS = 2048  # for training: labels are noisy, and fewer would be learned by heart
HELD_OUT_PROMPTS = 24  # of 96; nothing is trained on them
WORDS = Vocabulary([word.encode() for word in grammar.words()], rb" [a-z]+|The|\.")


class Task(abc.ABC):
    """The data of one run of the quickstart.

    - `vocabulary`, `widths`: the vocabulary and the widths of all rows of tokens.
    - `texts`: completions that the reference is fitted to.
    - `asked`: prompts that the policy completes in an evaluation.
    - `key`: the random key of these completions.
    """

    vocabulary: Vocabulary
    widths: Widths
    texts: dpx.UnpairedBatch
    asked: list[bytes]
    key: jax.Array

    @abc.abstractmethod
    def pairs(self, reference: models.Transformer) -> tuple[list[Pair], list[Pair]]:
        """The pairs to train on and the pairs held out."""

    def gold(self, texts: Sequence[bytes]) -> Sequence[float] | None:
        """The gold rewards of answers to `asked`, or `None` if they are unknown."""
        return None

    def frontier(self) -> Sequence[Sequence[float]]:
        """KLs and the best gold rewards that they allow; empty if unknown."""
        return ()

    @abc.abstractmethod
    def describe(self, held_out: int) -> str:
        """The sentence above the table of results."""

    @abc.abstractmethod
    def show_samples(self, exam: Exam, before: models.Transformer, after: models.Transformer):
        """Prints some answers before and after, if there is a gold reward to judge them."""


class Reviews(Task):
    """One-sentence reviews from a grammar; a simulated reader judges by a known gold reward."""

    vocabulary = WORDS

    def __init__(self, widths: Widths, *, fit: int, held_out: int, samples: int, seed: int):
        self.widths, self.held_out = widths, held_out
        self.rng = random.Random(seed)
        *self.judging, self.key = jax.random.split(jax.random.key(seed), 3)
        prompts = grammar.all_prompts()
        self.rng.shuffle(prompts)
        self.new, self.known = prompts[:HELD_OUT_PROMPTS], prompts[HELD_OUT_PROMPTS:]
        asked = self.rng.choices(self.known, k=fit)
        answers = [grammar.write_review(prompt, self.rng).encode() for prompt in asked]
        self.texts = WORDS.texts(encoded(asked), answers, widths)
        self.asked = encoded([self.new[i % len(self.new)] for i in range(samples)])

    def pairs(self, reference: models.Transformer) -> tuple[list[Pair], list[Pair]]:
        """Two samples of the reference for each prompt, the one that the reader prefers first."""
        train, rewards = self._judged(reference, self.known, PAIRS, self.judging[0])
        test, self.test_rewards = self._judged(reference, self.new, self.held_out, self.judging[1])
        self.rewards = np.concatenate([rewards, self.test_rewards])
        return train, test

    def _judged(self, reference, prompts, count, key):
        asked = self.rng.choices(prompts, k=count)
        return judged_samples(reference, self.widths, asked, self.rng, key)

    def gold(self, texts: Sequence[bytes]) -> Sequence[float]:
        return [gold(prompt.decode(), text) for prompt, text in zip(self.asked, texts, strict=True)]

    def frontier(self) -> Sequence[Sequence[float]]:
        return best_possible(self.rewards.ravel())

    def describe(self, held_out: int) -> str:
        return (
            f"On {held_out} held-out pairs and {len(self.asked)} fresh samples, of "
            f"{len(self.new)} prompts\nthat nothing was trained on, with 95% intervals:"
        )

    def show_samples(self, exam: Exam, before: models.Transformer, after: models.Transformer):
        difference = self.test_rewards[:, 0] - self.test_rewards[:, 1]
        ceiling = np.mean((1 + np.sign(difference)) / 2)
        show.say(
            f"\nThe labels are noisy: the gold reward itself ranks {ceiling:.2f} of them right.\n"
        )
        written = (exam.write(model) for model in (before, after))
        for prompt, *texts in list(zip(self.asked, *written, strict=True))[:3]:
            for name, text in zip(("before", "after"), texts, strict=True):
                worth = gold(prompt.decode(), text)
                show.say(f"  {name:6}  {worth:+.2f}  {prompt.decode()}{plain(text)}")


class File(Task):
    """The preference pairs of a JSON Lines file, byte by byte."""

    vocabulary = BYTES

    def __init__(self, path: Path, widths: Widths, *, held_out: int, samples: int, seed: int):
        pairs = usable_pairs(path, widths)
        pairs = random.Random(seed).sample(pairs, len(pairs))
        held_out = min(held_out, max(1, len(pairs) // 5))
        self.widths, self.key = widths, jax.random.key(seed)
        self.test, self.train = pairs[:held_out], pairs[held_out:]
        show.say(f"{len(self.train)} pairs are trained on, {len(self.test)} held out.")
        prompts, chosen, _ = zip(*self.train, strict=True)
        self.texts = BYTES.texts(prompts, chosen, widths)
        self.asked = [pair.prompt for pair in self.test[:samples]]

    def pairs(self, reference: models.Transformer) -> tuple[list[Pair], list[Pair]]:
        return self.train, self.test

    def describe(self, held_out: int) -> str:
        return f"On {held_out} held-out pairs and {len(self.asked)} fresh samples, 95% intervals:"

    def show_samples(self, exam: Exam, before: models.Transformer, after: models.Transformer):
        """Nobody knows the gold reward of a file's answers, so nothing is printed."""


def make_task(path: Path | None, settings: Any, *, seed: int) -> Task:
    """The task of a file of pairs, or of the reviews if there is no file.

    **Arguments:**

    - `settings`: has `widths`, `held_out`, `samples`, `fit_steps` and `fit_batch`.

    **Raises:**

    `OSError` or `ValueError` if the file gives nothing to train on.
    """
    common = {"held_out": settings.held_out, "samples": settings.samples, "seed": seed}
    if path is not None:
        return File(path, settings.widths, **common)
    return Reviews(settings.widths, fit=settings.fit_steps * settings.fit_batch, **common)


def judged_samples(
    reference: models.Transformer,
    widths: Widths,
    prompts: Sequence[str],
    rng: random.Random,
    key: jax.Array,
) -> tuple[list[Pair], np.ndarray]:
    """Two samples of the reference for each prompt, as pairs labelled by a simulated reader.

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
        order = (0, 1) if grammar.prefers_first(worth[0], worth[1], rng) else (1, 0)
        pairs.append(Pair(prompt.encode(), *(texts[i] for i in order)))
        rewards.append([worth[i] for i in order])
    return pairs, np.array(rewards)


def gold(prompt: str, completion: bytes) -> float:
    """The gold reward of a policy's completion."""
    return grammar.gold_reward(prompt, completion.decode(errors="replace"))


def encoded(texts: Sequence[str]) -> list[bytes]:
    """Texts as bytes."""
    return [text.encode() for text in texts]


def plain(text: bytes) -> str:
    """Text that cannot move the cursor of a terminal."""
    return text.decode(errors="replace").encode("unicode_escape").decode()


def usable_pairs(path: Path, widths: Widths) -> list[Pair]:
    """The usable pairs of a file. Prints an account of all its lines.

    **Raises:**

    `OSError` if the file cannot be read, `ValueError` if it has fewer than two usable pairs.
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
