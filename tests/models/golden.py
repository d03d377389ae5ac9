"""The golden checkpoints and traces that the tests of the models share."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import dpo_eqx as dpx
from dpo_eqx import models

FOLDER = Path(__file__).parents[1] / "golden" / "models"
FAMILIES = sorted(path.name for path in (FOLDER / "families").iterdir())
CHECKPOINTS = [FOLDER / "families" / name for name in FAMILIES]


class Uncached(eqx.Module):
    """A policy of which nothing is known but that it can be called."""

    policy: models.Transformer

    def __call__(self, ids):
        return self.policy(ids)


def expected(folder):
    """Ids, a mask of the real ones, and the logits that `transformers` gives."""
    values = np.load(folder / "expected.npz")
    ids = values["ids"].astype(np.int64)
    mask = values["mask"] if "mask" in values else np.ones(ids.shape, bool)
    return ids, mask, values["logits"]


def ragged_batch(seed, *, pairs=3, prompt=9, completion=7, vocab=96):
    """Random pairs with ragged prompts and completions, unscored context and an unscored row."""
    rng = np.random.default_rng(seed)

    def rows(width, lengths):
        mask = np.arange(width) < np.asarray(lengths)[:, None]
        return dpx.Tokens(rng.integers(0, vocab, (pairs, width)), mask)

    prompts = rows(prompt, [prompt, 2, 5])
    chosen = rows(completion, [completion, 1, 4])
    rejected = rows(completion, [3, completion, 0])
    holes = chosen.mask & (rng.random(chosen.mask.shape) < 0.7)
    return dpx.PreferenceBatch(prompts, dpx.Tokens(chosen.ids, holes), rejected)


class Perceptron(eqx.Module):
    """A user's policy of plain Equinox layers."""

    embedding: jax.Array
    mlp: eqx.nn.MLP

    def __call__(self, ids):
        return jax.vmap(self.mlp)(self.embedding[ids])


@eqx.filter_jit
def call(policy, ids):
    """The logits of a row, or whatever else the policy returns."""
    return policy(ids)


def same(one, other):
    """Whether two pytrees of one structure hold the same bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def shaken(policy):
    """With adapters that are not zero, nor what they were."""
    rng = np.random.default_rng(1)

    def shake(x, is_adapter):
        # In NumPy, since JAX would compile it for each shape.
        if not is_adapter:
            return x
        return jnp.asarray(np.asarray(x) + rng.normal(size=x.shape, scale=0.1).astype(x.dtype))

    return jax.tree.map(shake, policy, models.lora_filter(policy))


class Trace:
    """A recorded training run of TRL: its settings, its batches, what it logged."""

    def __init__(self, model, name):
        self.folder = FOLDER / "traces" / model
        values = json.loads((self.folder / f"{name}.json").read_text())
        self.arguments = values["arguments"]
        self.model = self.folder / values["model"]
        self.reference = self.folder / values["reference"]
        self.accumulation = values["accumulation"]
        self.steps = values["steps"]
        self.final = values["final"]
        self._arrays = np.load(self.folder / values["batches"])
        self._rows = [self._read(i) for i in range(8)]

    def batches(self):
        """The batch of every step, all of one width, stacked along a leading axis of steps."""
        steps = [self._joined(step["batches"]) for step in self.steps]
        widest = [max(batch.prompt.ids.shape[1] for batch in steps)]
        widest.append(max(batch.chosen.ids.shape[1] for batch in steps))
        padded = [_pad(batch, *widest) for batch in steps]
        return jax.tree.map(lambda *rows: jnp.stack(rows), *padded)

    def _read(self, number):
        ids, mask = (
            self._arrays[f"batch{number}_{name}"] for name in ("input_ids", "completion_mask")
        )
        pairs = ids.shape[0] // 2
        reference = None
        if f"batch{number}_ref_chosen_logps" in self._arrays:
            reference = dpx.PairLogProbs(
                *(
                    self._arrays[f"batch{number}_ref_{side}_logps"]
                    for side in ("chosen", "rejected")
                )
            )
        ids = ids.astype(np.int64)
        return dpx.PreferenceBatch.from_sequences(
            ids[:pairs], mask[:pairs], ids[pairs:], mask[pairs:], reference=reference
        )

    def _joined(self, numbers):
        batches = [self._rows[number] for number in numbers]
        prompt = max(batch.prompt.ids.shape[1] for batch in batches)
        completion = max(batch.chosen.ids.shape[1] for batch in batches)
        padded = [_pad(batch, prompt, completion) for batch in batches]
        return jax.tree.map(lambda *rows: np.concatenate(rows), *padded)


def _pad(batch, prompt, completion):
    def to(width, tokens):
        room = [(0, 0), (0, width - tokens.ids.shape[1])]
        return dpx.Tokens(np.pad(tokens.ids, room), np.pad(tokens.mask, room))

    return dpx.PreferenceBatch(
        to(prompt, batch.prompt),
        to(completion, batch.chosen),
        to(completion, batch.rejected),
        reference=batch.reference,
    )
