"""Feed-forward blocks with experts, and attention sinks, against dense oracles."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models
from dpo_eqx._jax.grouped_dot import grouped_dot
from dpo_eqx.models._decoder import attention, kernels
from dpo_eqx.models._decoder.experts import RoutedFeedForward

from ..policies import assert_close
from .golden import ragged_batch

MIXTURE = models.Config(
    vocab=40, width=16, layers=2, heads=4, key_heads=2, feed_forward=12, experts=5,
    experts_per_token=2,
)  # fmt: skip
CLIPPED = dataclasses.replace(
    MIXTURE, router_bias=True, feed_forward_bias=True, swiglu_limit=0.4, swiglu_alpha=1.3
)
RAW = dataclasses.replace(MIXTURE, normalised_routes=False, activation="gelu", experts_per_token=3)
RNG = np.random.default_rng(0)


def in_float64(tree):
    """The same tree with other numbers, in float64: biases are not zero then."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: (
            jnp.asarray(np.asarray(x, np.float64) + 0.3 * rng.normal(size=x.shape))
            if eqx.is_inexact_array(x)
            else x
        ),
        tree,
    )


POLICY = in_float64(models.Transformer(CLIPPED, key=jax.random.key(0)))


def every_expert_on_every_token(block, x, config):
    """An oracle: all experts run on all tokens, and those not chosen count nothing."""
    scores = x @ block.router.weight.T
    if block.router.bias is not None:
        scores = scores + jnp.broadcast_to(block.router.bias, scores.shape)
    order = jnp.argsort(-scores, axis=1)[:, : config.experts_per_token]
    chosen = jax.nn.one_hot(order, config.experts, dtype=bool).any(axis=1)
    exponentials = jnp.exp(scores)
    total = jnp.where(chosen | (not config.normalised_routes), exponentials, 0)
    weights = jnp.where(chosen, exponentials, 0) / total.sum(axis=1, keepdims=True)
    y = jnp.zeros_like(x)
    for i in range(config.experts):

        def apply(linear, x, i=i):
            out = x @ linear.weight[i].T
            return out if linear.bias is None else out + jnp.broadcast_to(linear.bias[i], out.shape)

        gate, up = apply(block.gate, x), apply(block.up, x)
        if config.swiglu_limit is None:
            inner = models_activation(config)(gate) * up
        else:
            gate = jnp.where(gate > config.swiglu_limit, config.swiglu_limit, gate)
            up = jnp.where(abs(up) > config.swiglu_limit, config.swiglu_limit * jnp.sign(up), up)
            inner = gate / (1 + jnp.exp(-config.swiglu_alpha * gate)) * (1 + up)
        y = y + weights[:, i, None] * apply(block.down, inner)
    return y


def models_activation(config):
    return {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}[
        config.activation
    ]


@pytest.mark.parametrize("config", [MIXTURE, RAW, CLIPPED], ids=["plain", "raw", "clipped"])
def test_a_block_equals_all_experts_on_all_tokens(config):
    """In value and gradient, over rows under `vmap`."""
    block = in_float64(RoutedFeedForward(config, key=jax.random.key(0)))
    x = jnp.asarray(RNG.normal(size=(3, 7, 16)))

    @eqx.filter_jit
    def value_and_gradient(function):
        def objective(operands):
            block, x = operands
            return jnp.sin(jax.vmap(lambda row: function(block, row))(x)).sum()

        return eqx.filter_value_and_grad(objective)((block, x))

    got = value_and_gradient(lambda block, x: block(x, config=config))
    want = value_and_gradient(lambda block, x: every_expert_on_every_token(block, x, config))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(one, np.asarray(other), 1e-12)


def dense_dot(x, matrices, group):
    return jnp.einsum("ri,roi->ro", x, matrices[group])


# Which of the rows, the matrices and the groups have an axis of examples.
AXES = [
    (0, None, 0),
    (0, 0, 0),
    pytest.param((None, 0, 0), marks=pytest.mark.slow),
    pytest.param((0, 0, None), marks=pytest.mark.slow),
    pytest.param((0, None, None), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("axes", AXES)
def test_grouped_products_and_their_derivatives(axes):
    shapes = (3, 6, 2), (3, 4, 3, 2), (3, 6)
    x, matrices = (RNG.normal(size=shape) for shape in shapes[:2])
    group = RNG.integers(0, 3, shapes[2]).astype(np.int32)  # nobody is in group 3
    x, matrices, group = (
        jnp.asarray(operand if axis == 0 else operand[0])
        for operand, axis in zip((x, matrices, group), axes, strict=True)
    )

    @jax.jit
    def values(x, matrices):
        """The value, the gradient in both modes, and the derivative of the gradient."""

        def of(function):
            def objective(x, matrices):
                return jnp.sin(jax.vmap(function, axes)(x, matrices, group)).sum()

            gradient = jax.grad(objective, (0, 1))
            moved = jax.jvp(gradient, (x, matrices), (jnp.cos(x), jnp.sin(matrices)))
            again = jax.grad(lambda *x: sum(jnp.sin(y).sum() for y in gradient(*x)), (0, 1))
            return objective(x, matrices), moved, again(x, matrices)

        return of(grouped_dot), of(dense_dot)

    got, want = values(x, matrices)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(one, np.asarray(other), 1e-12)


def test_the_tokens_of_all_rows_are_one_product():
    """Not one for each row: the shared weights then have one gradient, not one for each row."""
    ids = jnp.asarray(RNG.integers(0, 40, (4, 6)))

    def objective(policy):
        return jax.vmap(policy)(ids).sum()

    program = str(jax.make_jaxpr(eqx.filter_grad(objective))(POLICY))
    # 4 rows of 6 tokens with 2 experts each.
    assert "f64[48,12] = grouped_dot" in program
    assert "f64[5,12,16] = grouped_outer" in program
    assert "f64[4,5,12,16]" not in program


def test_a_row_has_the_same_log_probabilities_whatever_else_is_in_the_batch():
    batch = ragged_batch(0, vocab=40)
    together = eqx.filter_jit(dpx.score_pairs)(POLICY, batch)
    for pair in range(3):
        alone = eqx.filter_jit(dpx.score_pairs)(
            POLICY, jax.tree.map(lambda x, pair=pair: x[pair : pair + 1], batch)
        )
        assert_close(alone.chosen[0], np.asarray(together.chosen[pair]), 1e-12)
        assert_close(alone.rejected[0], np.asarray(together.rejected[pair]), 1e-12)


@pytest.mark.slow
def test_the_first_loss_is_log_2_and_microbatches_change_nothing():
    batch = ragged_batch(0, vocab=40)
    whole, parts = (
        eqx.filter_jit(dpx.make_grad(losses.dpo, microbatches=count))(POLICY, batch, POLICY)
        for count in (1, 3)
    )
    assert abs(whole[1]["loss"] - np.log(2)) < 1e-12
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert_close(one, np.asarray(other), 1e-11)


@pytest.mark.slow
def test_the_first_loss_is_log_2_in_bfloat16():
    """A router that saw other roundings would choose other experts for policy and reference."""
    policy = models.Transformer(MIXTURE, key=jax.random.key(0))
    grad = dpx.make_grad(losses.dpo, compute_dtype=jnp.bfloat16)
    _, metrics = eqx.filter_jit(grad)(policy, ragged_batch(0, vocab=40), policy)
    assert abs(metrics["loss"] - np.log(2)) < 1e-5


def test_a_step_trains_router_and_experts():
    batch = ragged_batch(0, vocab=40)
    gradients, _ = eqx.filter_jit(dpx.make_grad(losses.dpo))(POLICY, batch, POLICY)
    block = gradients.layers.feed_forward
    for leaf in jax.tree.leaves((block, gradients.layers.attention)):
        assert np.isfinite(leaf).all()
    assert abs(block.router.weight).max() > 0
    assert abs(block.down.weight).max() > 0


def softmax_with_a_sink(query, key, value, mask, sinks, scale):
    """An oracle: one more key for each head, whose score is the sink and whose value is zero."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key)
    scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
    column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.slow
def test_sinks_are_keys_without_values(monkeypatch):
    """In the plain and the cached road and under dropout; no kernel is asked for."""
    monkeypatch.setattr(kernels, "find", lambda *_: pytest.fail("kernels have no sinks"))
    query = jnp.asarray(RNG.normal(size=(2, 5, 4, 6)))
    key, value = (jnp.asarray(RNG.normal(size=(2, 5, 2, 6))) for _ in range(2))
    sinks, mask = jnp.asarray(RNG.normal(size=4)), jnp.tri(5, dtype=bool)
    config = dataclasses.replace(MIXTURE, head_width=6, attention_scale=0.7, attention_sinks=True)

    def ours(query, key, value, sinks):
        return attention.attend(query, key, value, mask, sinks=sinks, config=config)

    def oracle(query, key, value, sinks):
        return softmax_with_a_sink(query, key, value, mask, sinks, 0.7)

    operands = query, key, value, sinks
    want = oracle(*operands)
    assert_close(ours(*operands), np.asarray(want), 1e-12)
    got, slopes = (
        jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), (0, 1, 2, 3))(*operands)
        for f in (ours, oracle)
    )
    for one, other in zip(got, slopes, strict=True):
        assert_close(one, np.asarray(other), 1e-12)
    rare = dataclasses.replace(config, attention_dropout=1e-12)
    dropped = attention.attend(*operands[:3], mask, sinks=sinks, config=rare, rng=jax.random.key(0))
    assert_close(dropped, np.asarray(want), 1e-10)
    key, value = (jnp.swapaxes(x[0], 0, 1) for x in (key, value))
    parts = [
        (key[:, rows], value[:, rows], jnp.ones((1, rows.stop - rows.start), bool))
        for rows in (slice(0, 3), slice(3, 5))
    ]
    last = attention.attend_parts(query[0, 4:], parts, sinks=sinks, config=config)
    assert_close(last, np.asarray(want[0, 4:]), 1e-12)


QWEN = {"model_type": "qwen3_moe", "num_hidden_layers": 4}
REFUSED = [
    ({**QWEN, "num_experts_per_tok": 200}, r"`num_experts_per_tok` must be from 1 to .* 128"),
    (
        {**QWEN, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        "`max_window_layers`",
    ),
    (
        {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
        r"`quantization_config`: .*mxfp4.*Mxfp4Config\(dequantize=True\)",
    ),
    *(
        ({"model_type": family, key: 0}, f"`{key}` .*positive integer")
        for family, key in {
            "mixtral": "num_local_experts",
            "gpt_oss": "num_local_experts",
            "olmoe": "num_experts",
        }.items()
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_settings_that_are_not_supported(values, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(values)


def test_published_keys_of_gpt_oss():
    plain = {"model_type": "gpt_oss", "num_experts_per_tok": 4}
    noted = {"initial_context_length": 4096, "experts_per_token": 4, "router_aux_loss_coef": 0.9}
    assert models.read_config({**plain, **noted}) == models.read_config(plain)
    with pytest.raises(ValueError, match="`experts_per_token`"):
        models.read_config({**plain, "experts_per_token": 2})


def test_either_name_of_the_number_of_experts():
    for family in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss"):
        for key in ("num_experts", "num_local_experts"):
            config = models.read_config({"model_type": family, key: 16})
            assert config.experts == 16


def test_experts_need_a_gate():
    with pytest.raises(ValueError, match=r"`experts` must be 0 without a gate.* 5 experts"):
        dataclasses.replace(MIXTURE, gated=False)


def test_losses_and_loads_of_routers():
    """The first loss against `load_balancing_loss_func` of `transformers` 5.24, made by hand."""
    scores = np.sin(np.arange(60.0) ** 2).reshape(2, 6, 5)
    mask = np.arange(6) < np.array([[6], [4]])
    loss = models.load_balancing_loss(jnp.asarray(scores), mask, experts_per_token=2)
    assert abs(loss - 2.0929038524627686) < 1e-6  # it counts in float32
    z = np.log(np.exp(scores).sum(axis=-1))[mask]
    assert abs(models.router_z_loss(jnp.asarray(scores), mask) - (z**2).mean()) < 1e-12
    load = models.expert_load(jnp.asarray(scores), mask, experts_per_token=2)
    order = np.argsort(-scores, axis=-1)[mask][:, :2]
    assert_close(load, np.bincount(order.reshape(-1), minlength=5) / 20, 1e-12)
    even = models.load_balancing_loss(jnp.zeros((5, 5)), jnp.ones(5, bool), experts_per_token=2)
    assert abs(even - 2) < 1e-6


def test_scores_of_routers():
    """In the first layer those of its input; and a gradient reaches the routers."""
    ids = jnp.asarray(RNG.integers(0, 40, 6))

    def loss(policy):
        scores = models.router_scores(policy, ids)
        return models.router_z_loss(scores, jnp.ones((2, 6), bool)), scores

    (_, scores), slopes = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(POLICY)
    assert scores.shape == (2, 6, 5)
    assert (abs(slopes.layers.feed_forward.router.weight).max(axis=(1, 2)) > 0).all()
    with pytest.raises(ValueError, match=r"`policy` must have experts; .*`config.experts` is 0"):
        models.router_scores(
            models.Transformer(
                dataclasses.replace(MIXTURE, experts=0, experts_per_token=0, expert_width=0),
                key=jax.random.key(0),
            ),
            ids,
        )


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_training_steps_compile_once_and_learn():
    policy = models.Transformer(MIXTURE, key=jax.random.key(0))
    optimizer = optax.adam(1e-2)
    step = eqx.filter_jit(dpx.make_step(losses.dpo, optimizer))
    trained, state = policy, optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    batch = ragged_batch(0, vocab=40)
    values = []
    for _ in range(20):
        trained, state, metrics = step(trained, state, batch, policy)
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.5 * values[0]
