"""Meshes, rules and placements: where each array lies, and the errors that say why it cannot."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from dpo_eqx import data, models, sharding
from dpo_eqx._jax.partitioning import keep_rows, mesh_of, row_axes

from ..cli.runs import GOLDEN
from ..policies import Perceptron, arrays, random_batch

CONFIG = models.Config(vocab=64, width=32, layers=8, heads=8, feed_forward=64)


@pytest.fixture(scope="module")
def policy():
    return models.Transformer(CONFIG, key=jax.random.key(0))


def specs(tree):
    """The specification of each array by its path, trailing axes that are whole left out."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.sharding.spec
        for path, leaf in leaves
    }


def test_a_mesh_has_automatic_axes_in_order():
    mesh = sharding.make_mesh(" fsdp=2, data=4 ")
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(sharding.make_mesh("tensor=2", devices=jax.devices()[:2]).shape)["tensor"] == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("data=4", r"as there are devices, 8; data=4 \* fsdp=1 \* tensor=1 makes 4"),
        ("data=4,model=2", "the axes data, fsdp, expert, tensor.* got 'model' in 'data=4,model=2'"),
        ("data=4,data=2", "gives 'data' twice"),
        ("data=-1", "positive integers as sizes.* got 'data=-1'"),
        ("data", "positive integers as sizes.* got 'data'"),
        ("", "makes 1"),
    ],
)
def test_bad_meshes(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_a_transformer_and_its_optimiser(policy):
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    found = specs(sharding.shard_policy(policy, mesh))
    assert found["layers.attention.query.weight"] == P(None, "tensor", "fsdp")
    assert found["layers.attention.output.weight"] == P(None, "fsdp", "tensor")
    assert found["layers.feed_forward.down.weight"] == P(None, "fsdp", "tensor")
    assert found["embedding.weight"] == P(("tensor", "fsdp"), None)
    assert found["layers.attention_norm.weight"] == P()
    opt_state = optax.adamw(1e-3).init(arrays(policy))
    of_state = specs(sharding.shard_policy(opt_state, mesh))
    assert of_state["0.count"] == P()
    for path, spec in found.items():
        assert of_state[f"0.mu.{path}"] == of_state[f"0.nu.{path}"] == spec


def test_adapters_lie_with_their_layers(policy):
    adapted = models.add_lora(policy, rank=2, key=jax.random.key(1))
    found = specs(sharding.shard_policy(adapted, sharding.make_mesh("fsdp=4,tensor=2")))
    assert found["layers.attention.query.base.weight"] == P(None, "tensor", "fsdp")
    assert found["layers.attention.query.up"] == P(None, "tensor", None)
    assert found["layers.attention.output.down"] == P(None, None, "tensor")


def test_adafactor_keeps_vectors_under_the_paths_of_matrices(policy):
    state = optax.scale_by_factored_rms(min_dim_size_to_factor=8).init(arrays(policy))
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    for path, spec in specs(sharding.shard_policy(state, mesh)).items():
        assert "v_row" not in path or not any(spec), (path, spec)


def test_the_default_for_any_pytree():
    mesh = sharding.make_mesh("fsdp=8")
    tree = {
        "wide": jnp.zeros((48, 96)),
        "odd": jnp.zeros((1001, 80)),
        "indivisible": jnp.zeros((101, 99)),
        "small": jnp.zeros((8, 8)),
        "layers": {"0": jnp.zeros((96, 48)), "up": jnp.zeros((800, 16, 8))},
        "blocks": jnp.zeros((800, 16, 8)),
        "scalar": jnp.zeros(()),
        "name": "kept",
        "key": jax.random.key(0),
    }
    placed = sharding.shard_policy(tree, mesh, rules={r"^blocks$": sharding.stacked})
    found = specs(placed)
    assert found["wide"] == P(None, "fsdp")
    assert found["odd"] == P(None, "fsdp")
    assert found["indivisible"] == found["small"] == found["scalar"] == P()
    assert found["layers.0"] == P("fsdp")
    # Stacked along an axis that would be the largest; of the others the small one is left whole.
    assert found["layers.up"] == found["blocks"] == P()
    assert placed["name"] == "kept"
    assert placed["key"].dtype == tree["key"].dtype
    large = sharding.shard_policy({"layers": {"up": jnp.zeros((2, 16, 512))}}, mesh)
    assert specs(large)["layers.up"] == P(None, None, "fsdp")


def test_rules_of_a_user(policy):
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    rules = {r"gate\.weight$": P("fsdp", None), **sharding.TRANSFORMER}
    found = specs(sharding.shard_policy(policy, mesh, rules=rules))
    assert found["layers.feed_forward.gate.weight"] == P(None, "fsdp", None)
    assert found["layers.feed_forward.up.weight"] == P(None, "tensor", "fsdp")
    other = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    found = specs(sharding.shard_policy(policy, other, rules={"gate.weight$": P("model", None)}))
    assert found["layers.feed_forward.gate.weight"] == P(None, "model", None)


def test_a_vocabulary_that_does_not_divide_lies_over_the_width():
    policy = {"embedding": {"weight": np.zeros((61, 32))}}
    found = specs(sharding.shard_policy(policy, sharding.make_mesh("fsdp=4,tensor=2")))
    assert found["embedding.weight"] == P(None, ("fsdp", "tensor"))


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ("data=1,fsdp=8", {"gate.weight": P("rows")}, "data, fsdp, tensor; for .* name 'rows'"),
        (
            "fsdp=8",
            {"gate.weight": P("fsdp", None)},
            r"axis 1 of `layers.feed_forward.gate.weight`, of shape \(2, 36, 24\), has 36 entries "
            "for fsdp=8. Choose a size that divides 36",
        ),
    ],
)
def test_bad_rules(mesh, rules, message):
    policy = {"layers": {"feed_forward": {"gate": {"weight": np.zeros((2, 36, 24))}}}}
    mesh = sharding.make_mesh(mesh)
    with pytest.raises(ValueError, match=message):
        sharding.shard_policy(policy, mesh, rules=rules)


def test_batches_are_split_over_both_axes_of_rows():
    batch = random_batch(pairs=8)
    placed = sharding.shard_batch(batch, sharding.make_mesh("data=2,fsdp=2,tensor=2"))
    for leaf, local in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
        assert leaf.sharding.spec == P(("data", "fsdp"))
        np.testing.assert_array_equal(leaf, local)
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}


def packed(count):
    """Packed rows, so many, of two pairs each."""
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    return data.pack([ids] * (2 * count), 6)


@pytest.mark.parametrize("make", [lambda n: random_batch(pairs=n), packed], ids=["pairs", "packed"])
@pytest.mark.parametrize("rows", [2, 12])
def test_a_batch_that_does_not_split(make, rows):
    mesh = sharding.make_mesh("data=4,fsdp=2")
    message = rf"positive multiple of data \* fsdp = 8; got {rows}. Change the batch size"
    with pytest.raises(ValueError, match=message):
        sharding.shard_batch(make(rows), mesh)


def test_a_packed_batch_is_split_by_its_rows():
    placed = sharding.shard_batch(packed(8), sharding.make_mesh("data=4,fsdp=2"))
    assert (placed.rows, placed.pairs) == (8, 16)
    for leaf in jax.tree.leaves(placed):
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}


def test_what_has_no_rows_is_no_part_of_a_batch():
    with pytest.raises(ValueError, match=r"rows as their first axis; one of them is a scalar, 0.1"):
        sharding.shard_batch({"ids": np.zeros((8, 2)), "beta": 0.1}, sharding.make_mesh("data=8"))


class Device:
    """As much of a device as `batch_share` looks at."""

    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("shape", "per_process", "process", "share"),
    [
        ((4, 2, 1), 2, 1, (1, 4)),
        ((2, 2, 2), 2, 3, (3, 4)),
        # All have the same rows, or two and two.
        ((1, 1, 8), 2, 3, (0, 1)),
        ((2, 1, 4), 2, 1, (0, 2)),
        ((2, 1, 4), 2, 2, (1, 2)),
        ((1, 8, 1), 4, 1, (1, 2)),
    ],
)
def test_which_rows_a_process_has(unchecked, monkeypatch, shape, per_process, process, share):
    devices = np.array([Device(i // per_process) for i in range(8)]).reshape(shape)
    mesh: Any = MeshOf(devices)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert sharding.batch_share(mesh) == share


def test_rows_that_overlap_in_part_are_refused(unchecked, monkeypatch):
    mesh: Any = MeshOf(np.array([Device(i // 4) for i in range(12)]).reshape(2, 1, 6))
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(ValueError, match="divisor or a multiple of the devices of a process"):
        sharding.batch_share(mesh)


class MeshOf:
    """As much of a mesh as `batch_share` looks at, with devices of other processes."""

    axis_names = ("data", "fsdp", "tensor")

    def __init__(self, devices):
        self.devices = devices
        self.shape = dict(zip(self.axis_names, devices.shape, strict=True))


def test_gather_gives_whole_arrays(policy):
    placed = sharding.shard_policy(policy, sharding.make_mesh("fsdp=8"))
    whole = sharding.gather(placed)
    for got, want in zip(jax.tree.leaves(whole), jax.tree.leaves(arrays(policy)), strict=True):
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, want)
    assert whole.config == policy.config


def test_a_checkpoint_is_read_shard_by_shard(monkeypatch):
    """No host and no device ever holds a whole array that is split."""
    from dpo_eqx.models._checkpoint import fill_shards as placing

    seen = []
    before = placing._fill_shard
    monkeypatch.setattr(
        placing, "_fill_shard", lambda *args: seen.append(before(*args)) or seen[-1]
    )
    folder = GOLDEN / "models" / "families" / "llama"
    mesh = sharding.make_mesh("fsdp=8")
    loaded = models.load(folder, sharding=sharding.placement(mesh))
    split = {leaf.shape for leaf in jax.tree.leaves(arrays(loaded)) if leaf.sharding.spec != P()}
    assert len(split) > 3
    assert not split & {part.shape for part in seen}
    for got, want in zip(
        jax.tree.leaves(arrays(loaded)), jax.tree.leaves(arrays(models.load(folder))), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_rows_are_kept_only_on_meshes_of_ours():
    def axes(x):
        found.append((row_axes(x), mesh_of(x) is not None))
        return jax.vmap(keep_rows, spmd_axis_name=row_axes(x))(x)

    found = []
    ours = sharding.make_mesh("data=4,fsdp=2")
    other = Mesh(np.array(jax.devices()), ("batch",))
    for mesh, rows in [(ours, 8), (ours, 12), (other, 8), (None, 8)]:
        x = jnp.arange(rows * 2.0).reshape(rows, 2)
        here = x if mesh is None else jax.device_put(x, NamedSharding(mesh, P()))
        np.testing.assert_array_equal(eqx.filter_jit(axes)(here), x)
        np.testing.assert_array_equal(axes(here), x)  # not jitted
    jitted = found[::2]
    assert jitted == [(("data", "fsdp"), True), (None, True), (None, False), (None, False)]


def test_a_policy_of_a_user_is_placed_by_default():
    policy = Perceptron(jax.random.key(0))
    placed = sharding.shard_policy(policy, sharding.make_mesh("fsdp=8"))
    assert set(specs(placed).values()) == {P()}
