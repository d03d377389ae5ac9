"""Every family against `transformers`: logits, round trips, and the fast path against the plain."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import models

from .golden import CHECKPOINTS, FAMILIES, FOLDER, expected, ragged_batch


class Plain(eqx.Module):
    """A policy with its fast path hidden."""

    policy: models.Transformer

    def __call__(self, ids):
        return self.policy(ids)


@eqx.filter_jit
def logits_of(policy, ids):
    return jax.vmap(policy)(ids)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=FAMILIES)
def test_logits(folder):
    ids, mask, want = expected(folder)
    logits = logits_of(models.load(folder), jnp.asarray(ids))
    assert logits.dtype == jnp.float32
    assert np.abs(logits - want)[mask].max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_logits_of_traced_models(name):
    folder = FOLDER / "traces" / name
    values = np.load(folder / "expected.npz")
    logits = logits_of(models.load(folder / "model"), values["ids"].astype(np.int64))
    positions = values["positions"]
    deviation = np.abs(logits[:, positions] - values["logits"])
    assert deviation[values["mask"][:, positions]].max() < 1e-5


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=FAMILIES)
def test_round_trip_is_bit_identical(folder, tmp_path):
    policy = models.load(folder)
    models.save(policy, tmp_path / "saved")
    again = models.load(tmp_path / "saved")
    assert eqx.tree_equal(again, policy)
    before, after = (path / "model.safetensors" for path in (folder, tmp_path / "saved"))
    assert before.stat().st_size == after.stat().st_size


# Windows shorter than the prompt, also where some layers have none.
NARROW = {"mistral-sliding": 4, "gemma2": 4}
DTYPES = [(jnp.float64, 1e-10), (jnp.float32, 1e-5)]
# Each case is a compilation of seconds: by default one of each kind.
DEFAULT = {
    jnp.float64: ("gemma2", "gpt2", "mistral-sliding", "phi", "qwen3"),
    jnp.float32: ("gemma2",),
}
CASES = [
    pytest.param(name, *case, marks=[] if name in DEFAULT[case[0]] else [pytest.mark.slow])
    for case in DTYPES
    for name in FAMILIES
]


@pytest.mark.parametrize(("name", "dtype", "bound"), CASES)
def test_fast_path_equals_plain(name, dtype, bound):
    policy = models.load(FOLDER / "families" / name, dtype=dtype)
    policy = narrowed(policy, NARROW[name]) if name in NARROW else policy
    batch = ragged_batch(0)

    @eqx.filter_jit
    def scores(policy):
        return dpx.score_pairs(policy, batch), dpx.score_pairs(Plain(policy), batch)

    fast, plain = scores(policy)
    assert fast.chosen.dtype == dtype
    for side in ("chosen", "rejected"):
        want = getattr(plain, side)
        assert np.abs(getattr(fast, side) - want).max() < bound * (1 + np.abs(want).max())


def narrowed(policy, window):
    """The same parameters with narrower windows."""
    windows = tuple(window if old else None for old in policy.config.windows)
    config = models.read_config({**policy.origin.config, "sliding_window": window})
    assert config.windows == windows
    make = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(make), jax.tree.leaves(policy))


def test_window_hides_what_is_further_back():
    policy = narrowed(models.load(FOLDER / "families" / "mistral-sliding"), 3)
    ids = jnp.arange(20)
    first, second = logits_of(policy, jnp.stack([ids, jnp.where(ids == 0, 50, ids)]))
    # Two layers of windows of 3 reach 4 tokens back.
    assert np.all(first[5:] == second[5:])
    assert np.all(np.abs(first[:5] - second[:5]).max(axis=1) > 1e-4)
