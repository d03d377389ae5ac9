"""Batches of preference data: arrays, checked once, when a batch is created.

Reading files, tokenising and padding are not here; `dpo_eqx.data` does that.
"""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Integer

from .._jax.scalars import PerPair, Weights
from .log_probs import PairLogProbs, TokenValues, UnpairedLogProbs
from .sequences import split_sequences
from .tokens import Tokens


class PreferenceBatch(eqx.Module):
    """Pairs of completions of one prompt; the chosen completion is preferred to the rejected.

    A batch is made of NumPy or JAX arrays on the host, or of tracers inside a transformation. Use
    `jax.tree.map` to make trees of anything else, such as shardings or axis specifications.

    **Arguments:**

    - `prompt`: each mask is true on a prefix of at least one token. Shape `(pairs, prompt)`.
    - `chosen`, `rejected`: both padded to one width. Shape `(pairs, completion)`.
    - `weight`: the weight of each pair in every mean, finite and not negative. 0 removes a pair
        exactly, and `None` means 1. Shape `(pairs,)`.
    - `reference`: precomputed log-probabilities, as from `precompute_reference`.
    - `per_pair`: arguments of the loss by name, such as `{"beta": ...}`, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` that names the field, the requirement and both shapes. Values (prefixes, weights)
    are checked only if they are known, so not for tracers.
    """

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    weight: Weights | None = None
    reference: PairLogProbs | None = None
    per_pair: dict[str, PerPair] | None = None

    def __check_init__(self):
        check_prompt(self.prompt)
        check_completion("chosen", self.chosen, self.prompt)
        check_completion("rejected", self.rejected, self.prompt)
        if self.chosen.ids.shape != self.rejected.ids.shape:
            raise ValueError(
                "`chosen` and `rejected` must be padded to one width; got "
                f"{self.chosen.ids.shape} and {self.rejected.ids.shape}."
            )
        check_per_pair(self)

    @property
    def pairs(self) -> int:
        """The number of pairs."""
        return self.prompt.ids.shape[0]

    @staticmethod
    def from_sequences(
        chosen_ids: Integer[np.ndarray, "pairs chosen"],
        chosen_mask: Bool[np.ndarray, "pairs chosen"],
        rejected_ids: Integer[np.ndarray, "pairs rejected"],
        rejected_mask: Bool[np.ndarray, "pairs rejected"],
        **fields,
    ) -> "PreferenceBatch":
        """A batch from whole sequences with response masks, on the host.

        The prompt of a pair is the prefix that its two sequences share before the first scored
        token of either. If they differ earlier, the unscored tokens after the prefix go to the
        completions as context.

        **Arguments:**

        - `chosen_ids`, `rejected_ids`: prompt and response in one row, padded on the right. The
            two widths may differ. Shape `(pairs, length)`.
        - `chosen_mask`, `rejected_mask`: true at the scored tokens of the response. A row without
            scored tokens is an empty completion.
        - `fields`: the other fields of `PreferenceBatch`, by name.

        **Returns:**

        A batch of NumPy arrays, no wider than its longest prompt and completion.

        **Raises:**

        `ValueError` if the sequences of a pair do not share a first, unscored token.
        """
        return PreferenceBatch(
            *split_sequences(
                Tokens(np.asarray(chosen_ids), np.asarray(chosen_mask)),
                Tokens(np.asarray(rejected_ids), np.asarray(rejected_mask)),
            ),
            **fields,
        )


class UnpairedBatch(eqx.Module):
    """Single completions, each labelled desirable or not.

    **Arguments:**

    - `prompt`: each mask is true on a prefix of at least one token. Shape `(pairs, prompt)`.
    - `completion`: shape `(pairs, completion)`.
    - `label`: true if the completion is desirable. Shape `(pairs,)`.
    - `kl`: for each prompt, a completion of *another* prompt, drawn from the whole data set. KTO
        estimates its reference point from these. Shape `(pairs, kl)`.
    - `weight`, `reference`, `per_pair`: as in `PreferenceBatch`. Shape `(pairs,)`.

    **Raises:**

    `ValueError` that names the field, the requirement and both shapes, as `PreferenceBatch` does.
    """

    prompt: Tokens
    completion: Tokens
    label: Bool[Array | np.ndarray, " pairs"]
    kl: Tokens | None = None
    weight: Weights | None = None
    reference: UnpairedLogProbs | None = None
    per_pair: dict[str, PerPair] | None = None

    def __check_init__(self):
        check_prompt(self.prompt)
        check_completion("completion", self.completion, self.prompt)
        if self.kl is not None:
            check_completion("kl", self.kl, self.prompt)
        if self.label.dtype != bool:
            raise ValueError(
                "`label` must be boolean (true if the completion is desirable); got "
                f"{self.label.dtype}. Convert it, for instance by `label > 0`."
            )
        _check_per_pair_shape("label", self.label, self.pairs)
        check_per_pair(self)

    @property
    def pairs(self) -> int:
        """The number of completions."""
        return self.prompt.ids.shape[0]


def is_concrete(x: object) -> bool:
    """Whether the values of `x` can be read: it is not a tracer, and all of it is on this host."""
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return x.is_fully_addressable
    return isinstance(x, np.ndarray)


def check_prompt(prompt: Tokens) -> None:
    """Raises if prompts are not `(pairs, prompt)` with prefix masks of at least one token."""
    if prompt.ids.ndim != 2:
        raise ValueError(f"`prompt` must have shape `(pairs, prompt)`; got {prompt.ids.shape}.")
    if not is_concrete(prompt.mask):
        return
    # A layout knows only the length of a prompt, so its real tokens must be a prefix.
    mask = np.asarray(prompt.mask)
    lengths = mask.sum(axis=1)
    bad = (lengths == 0) | (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            "Each row of `prompt.mask` must be true on a prefix of at least one token (prompts are "
            f"padded on the right); row {row} has {lengths[row]} true positions of "
            f"{mask.shape[1]}, and begins with {mask[row, :8].tolist()}."
        )


def check_completion(name: str, completion: Tokens, prompt: Tokens) -> None:
    """Raises if completions are not `(pairs, completion)` with the prompt's pairs."""
    if completion.ids.ndim != 2 or completion.ids.shape[0] != prompt.ids.shape[0]:
        raise ValueError(
            f"`{name}` must have shape `(pairs, completion)` with the pairs of `prompt`, "
            f"{prompt.ids.shape[0]}; got {completion.ids.shape}."
        )
    if completion.ids.shape[1] == 0:
        raise ValueError(f"`{name}` must be at least one token wide; mask empty completions.")


def check_per_pair(batch: Any) -> None:
    """Raises if `weight`, `reference` or `per_pair` do not have one value for each pair.

    `batch` is any batch that has these fields and `pairs`.
    """
    if batch.weight is not None:
        _check_per_pair_shape("weight", batch.weight, batch.pairs)
        if is_concrete(batch.weight):
            weight = np.asarray(batch.weight)
            if not (np.isfinite(weight) & (weight >= 0)).all():
                raise ValueError(f"`weight` must be finite and not negative; got {weight}.")
    if batch.reference is not None:
        for name, value in vars(batch.reference).items():
            if value is not None and not isinstance(value, TokenValues):
                _check_per_pair_shape(f"reference.{name}", value, batch.pairs)
    for name, value in (batch.per_pair or {}).items():
        _check_per_pair_shape(f"per_pair[{name!r}]", value, batch.pairs)


def _check_per_pair_shape(name: str, value: Array | np.ndarray, pairs: int) -> None:
    if value.shape != (pairs,):
        raise ValueError(
            f"`{name}` must have one value per pair, shape ({pairs},); got {value.shape}."
        )
