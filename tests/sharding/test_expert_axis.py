"""Mixtures of experts on meshes with the axis `expert`, against one device."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx._jax.partitioning import row_axes
from dpo_eqx.models._decoder.experts import RoutedFeedForward
from dpo_eqx.sharding._collectives import collectives

from ..policies import arrays, random_batch
from .grid import SGD, deviation, packed_batch, wide
from .programs import CONFIG, compiled_step

MIXTURE = models.Config(
    vocab=16, width=16, layers=2, heads=4, key_heads=2, feed_forward=24, experts=8,
    experts_per_token=3, router_bias=True, feed_forward_bias=True,
)  # fmt: skip
MESHES = ["expert=8", "fsdp=2,expert=4", "data=2,expert=2,tensor=2"]
TOLERANCE = 1e-9


def noisy(tree, seed=1):
    """In float64, with biases that are not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape) if eqx.is_inexact_array(x) else x, wide(tree)
    )


def test_a_block_equals_one_device_however_tokens_choose():
    """In value and gradient; also if all tokens choose experts of one device, in several passes."""
    block = noisy(RoutedFeedForward(MIXTURE, key=jax.random.key(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 16)))

    @eqx.filter_jit
    def value_and_gradient(operands):
        def objective(operands):
            block, x = operands
            rows = jax.vmap(lambda x: block(x, config=MIXTURE), spmd_axis_name=row_axes(x))(x)
            return jnp.sin(rows).sum()

        return eqx.filter_value_and_grad(objective)(operands)

    mesh = sharding.make_mesh("fsdp=2,expert=4")
    place = {3: P("expert"), 2: P("expert")}
    for favoured in ([0, 0, 0, 0, 0, 0, 0, 0], [9, 8, 7, 6, 0, 0, 0, 0]):
        bias = jnp.asarray(favoured, jnp.float64)
        block = eqx.tree_at(lambda block: block.router.bias, block, bias)
        experts = block.gate, block.up, block.down
        placed = jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, place[x.ndim])), experts
        )
        on_mesh = eqx.tree_at(lambda block: (block.gate, block.up, block.down), block, placed)
        got = value_and_gradient((on_mesh, sharding.shard_batch(x, mesh)))
        assert deviation(got, value_and_gradient((block, x))) < 1e-12


@dataclasses.dataclass(frozen=True)
class Variant:
    """A step: of which policy and which rows."""

    remat: bool = False
    packed: bool = False
    coupled: bool = False
    adapters: bool = False
    quantized: str | None = None


VARIANTS = {
    "plain": Variant(),
    "recomputed layers": Variant(remat=True),
    "coupled in microbatches": Variant(coupled=True),
    "packed": Variant(packed=True),
    "adapters": Variant(adapters=True),
    "adapters of nf4": Variant(adapters=True, quantized="nf4"),
    "adapters of int8": Variant(adapters=True, quantized="int8", remat=True),
}


def policy_of(variant, seed=0):
    config = dataclasses.replace(MIXTURE, remat=variant.remat)
    policy = noisy(models.Transformer(config, key=jax.random.key(seed)))
    if variant.quantized:
        policy = models.quantize(policy, variant.quantized)
    if variant.adapters:
        policy = models.add_lora(
            policy, rank=2, key=jax.random.key(2), target="attention|feed_forward"
        )
        adapters, base = eqx.partition(policy, models.lora_filter(policy))
        policy = eqx.combine(noisy(adapters), base)
    return policy


def stepped(variant, mesh=None):
    """Parameters, the gradient's and the loss's metrics after a step."""
    policy, reference = policy_of(variant), policy_of(variant, seed=1)
    batch = packed_batch(np.random.default_rng(0)) if variant.packed else random_batch(pairs=16)
    if mesh is not None:
        policy, reference = sharding.shard_policy((policy, reference), mesh)
        batch = sharding.shard_batch(batch, mesh)
    options = {"microbatches": 2 if variant.coupled or variant.packed else 1}
    if variant.packed:
        options["score"] = dpx.score_packed
    if variant.adapters:
        reference = None
        options |= {"trainable": models.lora_filter(policy), "reference_of": models.without_lora}
    loss = losses.aot if variant.coupled else losses.dpo
    step = eqx.filter_jit(dpx.make_step(loss, SGD, **options))
    trained, _, metrics = step(policy, SGD.init(arrays(policy)), batch, reference)
    return arrays(trained), metrics


wanted = functools.cache(stepped)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sizes", MESHES)
def test_a_step_equals_one_device(sizes, name):
    variant = VARIANTS[name]
    got, want = stepped(variant, sharding.make_mesh(sizes)), wanted(variant)
    assert deviation(got, want) < TOLERANCE
    assert deviation(want[0], arrays(policy_of(variant))) > 1e-3, "the step has moved nothing"
    used = {str(x.sharding.spec) for x in jax.tree.leaves(got[0].layers.feed_forward.gate)}
    assert any("expert" in spec for spec in used)


@pytest.mark.slow
def test_samples_scores_and_losses_of_routers_equal_one_device():
    """Without a `vmap` over split rows, too: there all devices have the same tokens."""
    policy, ids = policy_of(Variant()), np.arange(32).reshape(8, 4) % 16
    mesh = sharding.make_mesh("fsdp=2,expert=4")

    def of(policy, ids):
        prompt = dpx.Tokens(ids, jnp.ones(ids.shape, bool))
        drawn = models.sample(policy, prompt, samples=2, max_new_tokens=5, key=jax.random.key(3))
        scores = jax.vmap(lambda ids: models.router_scores(policy, ids))(ids)
        mask = jnp.ones((8, 1, 4), bool)
        balance = models.load_balancing_loss(scores, mask, experts_per_token=3)
        one = eqx.filter_jit(eqx.filter_value_and_grad(lambda policy: (policy(ids[0]) ** 2).sum()))
        return (drawn.tokens.ids, drawn.log_probs), balance, one(policy)

    want = of(policy, jnp.asarray(ids))
    got = of(sharding.shard_policy(policy, mesh), sharding.shard_batch(ids, mesh))
    for one, other in zip(got, want, strict=True):
        assert deviation(one, other) < TOLERANCE


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    mesh = sharding.make_mesh("expert=8")
    policy = sharding.shard_policy(policy_of(Variant()), mesh)
    batch, score = random_batch(pairs=8), eqx.filter_jit(dpx.score_pairs)
    turned = jax.tree.map(lambda x: np.concatenate([x[:1], x[:0:-1]]), batch)
    one, other = (score(policy, sharding.shard_batch(x, mesh)) for x in (batch, turned))
    assert abs(one.chosen[0] - other.chosen[0]) < 1e-12
    assert abs(one.rejected[1:] - other.rejected[:0:-1]).max() < 1e-12


@pytest.mark.slow
def test_other_ways_to_run_a_step():
    """Explicit axes, a `shard_map` of the user, and the gradients of single rows by `vmap`."""
    variant = Variant()
    policy, reference, batch = (
        policy_of(variant),
        policy_of(variant, seed=1),
        random_batch(pairs=16),
    )
    explicit = jax.make_mesh((2, 4), ("data", "expert"))
    assert deviation(stepped(variant, explicit), wanted(variant)) < TOLERANCE

    mesh, names = sharding.make_mesh("fsdp=2,expert=4"), ("data", "fsdp", "expert")
    static = eqx.partition(policy, eqx.is_array)[1]
    step = dpx.make_step(losses.dpo, SGD, axis_name=names)

    def on_device(params, batch, reference):
        whole, beside = (eqx.combine(x, static) for x in (params, reference))
        trained, _, metrics = step(whole, SGD.init(params), batch, beside)
        return arrays(trained), metrics

    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(names), P()), out_specs=P())
    got = jax.jit(mapped)(arrays(policy), batch, arrays(reference))
    assert deviation(got, wanted(variant)) < TOLERANCE

    def of_rows(params, ids):
        one = jax.grad(lambda params, ids: (eqx.combine(params, static)(ids) ** 2).sum())
        return jax.vmap(one, (None, 0))(params, ids)

    ids = jnp.arange(12).reshape(2, 6)
    got = jax.jit(of_rows)(arrays(sharding.shard_policy(policy, mesh)), ids)
    assert deviation(got, jax.jit(of_rows)(arrays(policy), ids)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("of_policies", [False, True])
def test_sweeps_over_another_axis(of_policies):
    """Of `beta`, or of policies, too, which have experts of their own."""
    policy, mesh = policy_of(Variant()), sharding.make_mesh("data=2,expert=4")
    static = eqx.partition(policy, eqx.is_array)[1]

    def gradient(params, beta, batch):
        def loss(policy, reference):
            return losses.dpo(policy, reference, beta=beta)

        whole = eqx.combine(params, static)
        return dpx.make_grad(loss, microbatches=2)(whole, batch, policy)

    params, betas, batch = arrays(policy), jnp.array([0.1, 0.3]), random_batch(pairs=16)
    if of_policies:
        params = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), params)

    def put(tree, *names):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*names))), tree)

    axis = 0 if of_policies else None
    sweep = jax.jit(jax.vmap(gradient, (axis, 0, None), spmd_axis_name="data"))
    placed = put(params, *("data",) * of_policies)
    got = sweep(placed, put(betas, "data"), put(batch, "expert"))
    for i, beta in enumerate(betas):
        here = jax.tree.map(lambda x, i=i: x[i], params) if of_policies else params
        want = jax.jit(gradient)(here, beta, batch)
        assert deviation(jax.tree.map(lambda x, i=i: x[i], got), want) < TOLERANCE


@pytest.mark.slow
def test_experts_stay_on_their_devices():
    """Tokens move along `expert`, four times in each layer, and no weight of an expert does."""
    config = dataclasses.replace(CONFIG, experts=8, experts_per_token=2, expert_width=96)
    moved = collectives(compiled_step(sharding.make_mesh("expert=8"), config=config).as_text())
    assert not [each for each in moved if each.shape[-2:] in {(96, 64), (64, 96)}]
    tokens = 16 * (24 + 2 * 16)
    gathered = [each for each in moved if each.kind == "all-gather" and each.shape == (tokens, 64)]
    # Those of the policy and its reference forward, and tokens and cotangents backward.
    assert sum(each.times for each in gathered) == 4 * 4
    summed = [each for each in moved if each.shape == (tokens // 8, 64)]
    assert {each.kind for each in summed} == {"reduce-scatter"}
    assert sum(each.times for each in summed) == 3 * 4


def test_placement_of_experts():
    mesh = sharding.make_mesh("fsdp=2,expert=2,tensor=2")
    place = sharding.placement(mesh)

    def spec(path, *shape):
        return place(path, jax.ShapeDtypeStruct(shape, jnp.float32)).spec

    gate, down = "layers.feed_forward.gate", "layers.feed_forward.down"
    assert spec(f"{gate}.weight", 2, 8, 24, 16) == P(None, "expert", "tensor", "fsdp")
    assert spec(f"{down}.weight", 2, 8, 16, 24) == P(None, "expert", "fsdp", "tensor")
    assert spec(f"{down}.bias", 2, 8, 16) == P(None, "expert", "fsdp")
    assert spec(f"{gate}.base.stored.codes", 2, 8, 24, 32) == P(None, "expert", "tensor", "fsdp")
    assert spec(f"{gate}.base.stored.scales", 2, 8, 24, 1) == P(None, "expert", "tensor", None)
    assert spec(f"{gate}.down", 2, 8, 4, 16) == P(None, "expert", None, "fsdp")
    assert spec(f"{gate}.up", 2, 8, 24, 4) == P(None, "expert", "tensor", None)
    # Everything else is split over both axes together.
    assert spec(f"{gate}.weight", 2, 24, 16) == P(None, "tensor", ("fsdp", "expert"))
    assert spec("x", 64, 128) == P(None, ("fsdp", "expert"))
    assert sharding.batch_share(mesh) == (0, 1)
    with pytest.raises(
        ValueError, match=r"axis 1 of `layers.*weight`.* has 5 entries for expert=2"
    ):
        spec(f"{gate}.weight", 2, 5, 24, 16)
