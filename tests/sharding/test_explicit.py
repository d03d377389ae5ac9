"""Meshes with explicit axes, as `jax.make_mesh` makes them: the same results as without a mesh."""

import contextlib
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx._jax.microbatches import merge, split

from ..cli.runs import GOLDEN
from ..policies import VOCAB, Attention, Plain, arrays, assert_close, random_batch
from .grid import CONFIG, packed_batch, wide

PAIRS = 16
TOLERANCE = 1e-9
POLICY, REFERENCE = (Attention(jax.random.key(seed), width=4) for seed in (0, 1))
EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


class OneHot(eqx.Module):
    """A plain policy without a gather, so that it traces under explicit axes by itself."""

    table: jax.Array
    dropout: eqx.nn.Dropout = eqx.nn.Dropout(0.5)

    def __call__(self, ids, *, key=None):
        rows = jax.nn.one_hot(ids, VOCAB, dtype=self.table.dtype) @ self.table
        return self.dropout(rows, key=key, inference=key is None)


@functools.cache
def batch():
    """Unequal weights; a device of each mesh has none."""
    weight = np.random.default_rng(0).uniform(0.5, 2, PAIRS)
    weight[[2, 3, 9]] = 0
    return random_batch(pairs=PAIRS, weight=weight, prompt=3, completion=3)


def on(mesh, policies, rows):
    """Policies replicated, and what has rows split over the first axis of the mesh."""
    put = jax.device_put(arrays(policies), NamedSharding(mesh, P()))
    split = jax.device_put(rows, NamedSharding(mesh, P(mesh.axis_names[0])))
    return eqx.combine(put, policies), split


def is_laid_as(tree, like):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)


@pytest.mark.parametrize(
    ("loss", "microbatches", "shape", "names", "types", "in_context"),
    [
        pytest.param(losses.dpo, 1, (8,), ("data",), None, False, marks=pytest.mark.slow),
        (losses.aot, 2, (4, 2), ("data", "tensor"), (EXPLICIT, AUTO), True),
        # Four pairs in a microbatch, which eight devices cannot split.
        pytest.param(losses.dpo, 4, (8, 1), ("batch", "x"), None, False, marks=pytest.mark.slow),
    ],
    ids=["one pass", "coupled on a mixed mesh", "names of a user"],
)
def test_a_fast_policy(loss, microbatches, shape, names, types, in_context):
    want = eqx.filter_jit(dpx.make_grad(loss))(POLICY, batch(), REFERENCE)
    mesh = jax.make_mesh(shape, names, axis_types=types)
    grad = eqx.filter_jit(dpx.make_grad(loss, microbatches=microbatches))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        (policy, reference), rows = on(mesh, (POLICY, REFERENCE), batch())
        got = grad(policy, rows, reference)
    assert_close(got, want, TOLERANCE)
    assert is_laid_as(got[0], arrays(policy))
    assert all(value.sharding.is_fully_replicated for value in got[1].values())


@pytest.mark.slow
def test_a_plain_policy_runs_under_explicit_axes_itself():
    """With dropout, a coupled loss and microbatches."""
    policy = OneHot(jax.random.normal(jax.random.key(0), (VOCAB, VOCAB)))
    key = jax.random.key(2)
    want = eqx.filter_jit(dpx.make_grad(losses.aot))(policy, batch(), REFERENCE, key=key)
    mesh = jax.make_mesh((8,), ("data",))
    grad = eqx.filter_jit(dpx.make_grad(losses.aot, microbatches=2))
    # JAX draws random numbers under explicit axes only in the context of the mesh.
    with jax.set_mesh(mesh):
        (policy, reference), rows = on(mesh, (policy, REFERENCE), batch())
        got = grad(policy, rows, reference, key=key)
    assert_close(got, want, TOLERANCE)


def everything(policies, rows, packed):
    """What runs policies or heads beside a step."""
    policy, reference = policies
    hidden = jax.nn.one_hot(rows.chosen.ids, 4, dtype=policy.unembedding.dtype)
    head = hidden, policy.unembedding
    odds = dpx.precompute_reference(reference, rows, microbatches=2)
    return {
        "eval": dpx.make_eval(losses.aot_unpaired)(policy, rows, reference),
        "compare": dpx.compare(policy, reference, rows),
        "compare with a plain one": dpx.compare(policy, Plain(reference), rows),
        "kl": dpx.linear_kl(*head, hidden, reference.unembedding),
        "head": dpx.linear_token_log_probs(*head, targets=jnp.abs(rows.chosen.ids)),
        "packed": dpx.score_packed(policy, packed),
        "desensitised": dpx.ld_score(0.5)(policy, rows),
        "confidence": dpx.score_pairs(policy, rows, confidence=True),
        "reference": odds,
        "sweep": jax.vmap(lambda beta: losses.aot(odds, odds, beta=beta).loss)(jnp.arange(1.0, 3)),
    }


@pytest.mark.slow
def test_everything_beside_the_step():
    packed = packed_batch(np.random.default_rng(0))
    packed = eqx.tree_at(lambda x: x.ids, packed, packed.ids % VOCAB)
    policies = POLICY, REFERENCE
    want = eqx.filter_jit(everything)(policies, batch(), packed)
    mesh = jax.make_mesh((8,), ("data",))
    placed, (rows, packed) = on(mesh, policies, (batch(), packed))
    got = eqx.filter_jit(everything)(placed, rows, packed)
    assert_close(got, want, TOLERANCE)
    for name in ("compare", "kl", "head", "packed", "confidence", "reference"):
        assert {x.sharding.spec[0] for x in jax.tree.leaves(got[name])} == {"data"}, name


def test_a_coupled_loss_that_is_not_jitted():
    u, v = jax.random.normal(jax.random.key(0), (2, PAIRS))
    pairs = dpx.PairLogProbs(u, v)
    mesh = jax.make_mesh((8,), ("data",))
    _, placed = on(mesh, (), pairs)
    assert_close(losses.aot(placed, placed), losses.aot(pairs, pairs), TOLERANCE)


@pytest.mark.slow
def test_a_transformer():
    """Parameters and rows over the same axes; called by itself, trained and sampled from."""
    policy = wide(models.Transformer(CONFIG, key=jax.random.key(0)))

    def run(policy, rows):
        return {
            "logits": jax.vmap(policy)(rows.prompt.ids),
            "step": dpx.make_grad(losses.aot)(policy, rows, policy),
            "drawn": models.generate(policy, rows.prompt, max_new_tokens=2, temperature=0),
        }

    rows = jax.tree.map(lambda x: x if x.dtype == bool else abs(x), batch())
    want = eqx.filter_jit(run)(policy, rows)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    placed, rows = sharding.shard_policy(policy, mesh), sharding.shard_batch(rows, mesh)
    got = eqx.filter_jit(run)(placed, rows)
    assert_close(got, want, TOLERANCE)
    assert is_laid_as(got["step"][0], arrays(placed))


def test_a_checkpoint_is_loaded_onto_it():
    """The rules for axes that the mesh lacks leave what they split whole."""
    folder = GOLDEN / "models" / "families" / "llama"
    mesh = jax.make_mesh((8,), ("data",))
    loaded = models.load(folder, sharding=sharding.placement(mesh))
    assert_close(loaded, models.load(folder), 1e-12)
    for leaf in jax.tree.leaves(arrays(loaded)):
        assert leaf.sharding.mesh == mesh
        assert leaf.sharding.is_fully_replicated


def test_microbatches_that_the_devices_cannot_split():
    """Every device then has all rows, as under automatic partitioning."""
    _, x = on(jax.make_mesh((8,), ("data",)), (), jnp.arange(PAIRS))
    np.testing.assert_array_equal(split(x, 4)[1], np.arange(1, PAIRS, 4))
    np.testing.assert_array_equal(merge(split(x, 4)), x)
    assert split(x, 2).sharding.spec == P(None, "data")


def test_a_batch_needs_an_axis_for_its_rows():
    with pytest.raises(ValueError, match=r"must have an axis data or fsdp.*got batch\. Make it by"):
        sharding.shard_batch(batch(), jax.make_mesh((8,), ("batch",)))
