"""A row's prompt and completions as parts of attention: what each part's queries can see.

A prompt sees itself, and a completion sees the prompt and itself.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Run(NamedTuple):
    """Neighbouring completions of equal width: the place of the first token, number and width."""

    start: int
    completions: int
    width: int

    def of(self, x: Float[Array, "length *shape"]) -> Float[Array, "completions width *shape"]:
        """The run's part of the tokens of a row, with an axis of completions."""
        end = self.start + self.completions * self.width
        return x[self.start : end].reshape(self.completions, self.width, *x.shape[1:])


class Widths(NamedTuple):
    """The static widths of a row's prompt and of each completion, as in a `Layout`."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def runs(self) -> list[Run]:
        """The runs of completions, in order."""
        runs, start = [], self.prompt
        for width, run in itertools.groupby(self.completions):
            runs.append(Run(start, len(list(run)), width))
            start += runs[-1].completions * width
        return runs


def split(
    widths: Widths,
    query: Float[Array, "length *heads head_width"],
    key: Float[Array, "length key_heads head_width"],
    value: Float[Array, "length key_heads head_width"],
) -> list[tuple[Array, Array, Array]]:
    """Query, key and value of the prompt, and of each run of completions.

    Each has an axis of sequences in front: one prompt, or the completions of the run, whose keys
    and values are those of the prompt and then their own.
    """
    prompt = Run(0, 1, widths.prompt)
    of_prompt = prompt.of(query), prompt.of(key), prompt.of(value)
    return [
        of_prompt,
        *(
            (
                run.of(query),
                _behind(of_prompt[1], run.of(key)),
                _behind(of_prompt[2], run.of(value)),
            )
            for run in widths.runs
        ),
    ]


def join(
    outputs: Sequence[Float[Array, "_ _ *heads width"]],
) -> Float[Array, "length *heads width"]:
    """The row of what has an axis of sequences for each part."""
    return jnp.concatenate([x.reshape(-1, *x.shape[2:]) for x in outputs])


def split_like(
    widths: Widths, x: Float[Array, "length *heads width"]
) -> list[Float[Array, "_ _ *heads width"]]:
    """The inverse of `join`."""
    return [run.of(x) for run in (Run(0, 1, widths.prompt), *widths.runs)]


def _behind(
    prompt: Float[Array, "1 prompt key_heads head_width"],
    own: Float[Array, "count completion key_heads head_width"],
) -> Float[Array, "count both key_heads head_width"]:
    """The prompt's keys or values followed by each completion's."""
    before = jnp.broadcast_to(prompt, (own.shape[0], *prompt.shape[1:]))
    return jnp.concatenate([before, own], axis=1)
