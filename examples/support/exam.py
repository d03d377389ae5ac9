"""Evaluation of a policy: its ranking of held-out pairs, its samples, and its KL to the reference.

This file does not train; an evaluation does not change the policy.
"""

import dataclasses
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import dpo_eqx as dpx
from dpo_eqx import models

from .vocabulary import in_chunks

if TYPE_CHECKING:
    from .tasks import Task

CHUNK = 64  # pairs that are evaluated at once: it changes only the memory

Metrics = dict[str, float]


class Exam:
    """The same questions for every policy: held-out pairs to rank, and prompts to complete.

    **Arguments:**

    - `reference`: the reference; its log-probabilities of the pairs are computed once, here.
    - `pairs`: the pairs to rank.
    - `task`: prompts to complete (`asked`), the vocabulary, widths, key and gold reward.
    - `beta`: the `beta` of the loss and the rewards.
    """

    def __init__(
        self,
        reference: models.Transformer,
        pairs: dpx.PreferenceBatch,
        task: "Task",
        *,
        beta: float,
    ):
        precompute = eqx.filter_jit(dpx.precompute_reference)
        self.chunks = [
            dataclasses.replace(chunk, reference=precompute(reference, chunk))
            for chunk in in_chunks(pairs, CHUNK)
        ]
        self.evaluate = eqx.filter_jit(dpx.make_eval(partial(dpx.losses.dpo, beta=beta)))
        self.reference, self.task = reference, task
        self.prompts = task.vocabulary.prompts(task.asked, task.widths.prompt)

    def write(self, policy: models.Transformer) -> list[bytes]:
        """A completion of each prompt, sampled with the same random numbers every time."""
        return self.task.vocabulary.decode(self._draw(policy))

    def look(self, policy: models.Transformer) -> Metrics:
        """The metrics of the pairs, and the KL and gold reward of samples with standard errors."""
        metrics = reduce(add, (self.evaluate(policy, chunk) for chunk in self.chunks)).mean()
        written = self._draw(policy)
        samples = {"kl": np.asarray(kl(policy, self.reference, self.prompts, written))}
        rewards = self.task.gold(self.task.vocabulary.decode(written))
        if rewards is not None:
            samples["gold"] = np.asarray(rewards)
        means = {name: float(x.mean()) for name, x in samples.items()}
        errors = {f"{name}_error": float(x.std()) / x.size**0.5 for name, x in samples.items()}
        return {name: float(value) for name, value in metrics.items()} | means | errors

    def _draw(self, policy: models.Transformer) -> dpx.Tokens:
        width, end = self.task.widths.completion, self.task.vocabulary.end
        return draw(policy, self.prompts, width=width, key=self.task.key, end=end)


def draw(
    policy: models.Transformer, prompts: dpx.Tokens, *, width: int, key: jax.Array, end: int
) -> dpx.Tokens:
    """A completion of each prompt, sampled from the policy."""
    return models.generate(policy, prompts, max_new_tokens=width, key=key, eos=end)


@eqx.filter_jit
def kl(policy, reference, prompt: dpx.Tokens, completion: dpx.Tokens) -> jax.Array:
    """KL of the policy to the reference, in nats, summed over each completion's positions.

    At each position it is the sum over the vocabulary, not a sample of it. The mean over
    completions that the policy wrote estimates the KL of the distributions of completions.
    """

    def one_row(prompt, length, completion, mask):
        row = jnp.concatenate([prompt, jnp.zeros_like(completion)])
        row = jax.lax.dynamic_update_slice(row, completion, (length,))
        by_position = dpx.token_kl(policy(row), reference(row))
        scored = jax.lax.dynamic_slice_in_dim(by_position, length - 1, mask.size)
        return jnp.where(mask, scored, 0).sum()

    lengths = prompt.mask.sum(axis=1, dtype=np.int32)
    return jax.vmap(one_row)(prompt.ids, lengths, completion.ids, completion.mask)


def best_possible(rewards: np.ndarray) -> tuple[list[float], list[float]]:
    """KLs, and the highest mean gold reward that each allows, from rewards of the reference.

    The best policies are the reference's distribution tilted by `exp(strength * reward)`. The list
    ends at the strength beyond which fewer than 30 samples effectively carry the estimate.
    """
    kls, means = [], []
    for strength in np.linspace(0, 8, 81):
        weight = np.exp(strength * (rewards - rewards.max()))
        weight /= weight.sum()
        if 1 / (weight**2).sum() < 30:
            break
        kls.append(float((weight * np.log(np.maximum(weight * rewards.size, 1e-30))).sum()))
        means.append(float((weight * rewards).sum()))
    return kls, means
