"""TRL's own training runs, replayed step by step from the same checkpoints.

`tests/golden/models/README.md` says how they were made.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models
from dpo_eqx._jax.paths import leaf_name
from dpo_eqx.models._checkpoint.save import tensors_of

from .golden import FOLDER, Trace

DEFAULT = [("llama", "adamw_maxlen48_wd_clip")]
SLOW = [
    ("qwen3", "adamw"),
    ("gpt2", "sgd"),
    ("llama", "sgd"),
    ("llama", "adamw"),
    ("llama", "ipo"),
    ("llama", "ipo_adamw"),
    ("llama", "ga2_sgd"),
    ("llama", "ga2_adamw"),
    ("llama", "sgd_lr5e-2"),
    ("llama", "sgd_refdiff"),
    ("llama", "adamw_refdiff_robust"),
    ("llama", "adamw_precomputed_ref"),
    ("qwen3", "sgd"),
    ("qwen3", "sgd_conversational"),
    ("qwen3", "adamw_conversational"),
    ("gpt2", "adamw"),
]
NAMES = [
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
]


def loss_of(trace):
    (kind,) = trace.arguments["loss_type"]
    smoothing = {"label_smoothing": 0.1} if kind == "robust" else {}
    return functools.partial(losses.BY_NAME[kind], beta=trace.arguments["beta"], **smoothing)


def decays(params):
    """Where Hugging Face's trainer decays weights: not in norms, nor in biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in leaf_name(path) and not leaf_name(path).endswith("bias"),
        params,
    )


def schedule_of(trace):
    rate = trace.arguments["learning_rate"]
    if trace.arguments["lr_scheduler_type"] == "constant":
        return optax.constant_schedule(rate)
    warmup = trace.arguments["warmup_steps"]
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, len(trace.steps))


def optimizer_of(trace):
    arguments = trace.arguments
    if arguments["optim"] == "sgd":
        return optax.sgd(schedule_of(trace))
    adamw = optax.adamw(schedule_of(trace), weight_decay=arguments["weight_decay"], mask=decays)
    clip = arguments["max_grad_norm"]
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw


def replay(trace):
    """The metrics of every step, and the policy at the end."""
    policy = models.load(trace.model)
    batches = trace.batches()
    reference = None if batches.reference is not None else models.load(trace.reference)
    optimizer = optimizer_of(trace)
    step = dpx.make_step(loss_of(trace), optimizer, microbatches=trace.accumulation)
    params, static = eqx.partition(policy, eqx.is_array)

    @jax.jit
    def run(params, batches):
        def body(carry, batch):
            params, opt_state = carry
            policy, opt_state, metrics = step(
                eqx.combine(params, static), opt_state, batch, reference
            )
            return (eqx.filter(policy, eqx.is_array), opt_state), metrics

        (params, _), metrics = jax.lax.scan(body, (params, optimizer.init(params)), batches)
        return params, metrics

    # Optax itself does not keep to strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        params, metrics = run(params, batches)
    return metrics, eqx.combine(params, static)


def accuracies(step):
    """TRL's, but with ties counting one half; and how many pairs are near a tie."""
    margins = np.concatenate(step["chosen_rewards"]) - np.concatenate(step["rejected_rewards"])
    return np.mean((margins > 0) + 0.5 * (margins == 0)), np.mean(np.abs(margins) < 1e-5)


@pytest.mark.slow  # tests/cli/test_traces.py replays one of them by default
@pytest.mark.parametrize(("model", "name"), DEFAULT + SLOW)
def test_replays(model, name):
    trace = Trace(model, name)
    metrics, policy = replay(trace)
    bound = 2e-5 if trace.arguments["optim"] == "sgd" else 5e-5
    for key in NAMES:
        want = np.array([step[key] for step in trace.steps])
        deviation = np.abs(np.asarray(metrics[key]) - want) / (1 + np.abs(want))
        assert deviation.max() < bound, (key, deviation)
    for step, got in zip(trace.steps, metrics["rewards/accuracies"], strict=True):
        want, near = accuracies(step)
        assert abs(got - want) <= near
    rates = [step["learning_rate"] for step in trace.steps]
    with jax.numpy_dtype_promotion("standard"):
        scheduled = jax.vmap(schedule_of(trace))(jnp.arange(len(rates)))
    assert np.allclose(scheduled, rates, rtol=0, atol=1e-9)
    for tensor in tensors_of(policy):
        # The gradient of GPT-2's key biases is zero but for rounding, which Adam makes large.
        if tensor.name.endswith("c_attn.bias") and trace.arguments["optim"] != "sgd":
            continue
        values, want = tensor.read().astype(np.float64), trace.final[tensor.name]
        norm = np.linalg.norm(values)
        assert abs(norm - want["l2"]) < 5e-5 * (1 + want["l2"]), tensor.name


@pytest.mark.parametrize(
    "model",
    ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3"))],
)
def test_first_gradient(model):
    trace = Trace(model, "sgd")
    policy = models.load(trace.model)
    batch = jax.tree.map(lambda x: x[0], trace.batches())
    grad = eqx.filter_jit(dpx.make_grad(loss_of(trace)))
    gradients, metrics = grad(policy, batch, models.load(trace.reference))
    assert abs(metrics["loss"] - np.log(2)) < 1e-6
    want = np.load(FOLDER / "traces" / model / "gradients.npz")
    got = {tensor.name: tensor.read() for tensor in tensors_of(gradients)}
    assert got.keys() == set(want.keys())
    for name, values in got.items():
        assert np.abs(values - want[name]).max() < 1e-5 * (1 + np.abs(want[name]).max()), name
