"""DPO in plain JAX and Equinox: good code that does not use this library.

Chosen and rejected are `2 * pairs` rows of prompt and completion, and the logits of all positions
are built; everything is one jitted program with donated buffers.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from benchmarks.problem import Problem, token_ids
from benchmarks.turns import Turns
from benchmarks.workers import given_problem

Weights = dict[str, Float[Array, "..."]]


class Llama(eqx.Module):
    """A llama for a batch of rows of the same length; layers are stacked and scanned.

    **Arguments:**

    - `tensors`: the tensors of a checkpoint, under Hugging Face's names.
    - `problem`: the problem, which has the shape.
    """

    embedding: Float[Array, "vocab width"]
    layers: Weights
    norm: Float[Array, " width"]
    head: Float[Array, "vocab width"]
    heads: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    def __init__(self, tensors: dict[str, np.ndarray], problem: Problem):
        first = "model.layers.0."
        names = [name.removeprefix(first) for name in tensors if name.startswith(first)]
        self.layers = {
            name: jnp.stack([tensors[f"model.layers.{i}.{name}"] for i in range(problem.layers)])
            for name in names
        }
        self.embedding = jnp.asarray(tensors["model.embed_tokens.weight"])
        self.norm = jnp.asarray(tensors["model.norm.weight"])
        self.head = jnp.asarray(tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
        self.heads, self.theta, self.norm_eps = problem.heads, problem.theta, problem.norm_eps

    def __call__(self, ids: Int[Array, "rows length"]) -> Float[Array, "rows length vocab"]:
        """The logits of all positions."""
        x = self.embedding[ids]
        x, _ = jax.lax.scan(lambda x, layer: (self._layer(x, layer), None), x, self.layers)
        return self._normed(x, self.norm) @ self.head.T

    def _layer(self, x: Float[Array, "rows length width"], layer: Weights) -> Array:
        normed = self._normed(x, layer["input_layernorm.weight"])
        query, key, value = (
            (normed @ layer[f"self_attn.{name}_proj.weight"].T).reshape(
                *x.shape[:2], self.heads, -1
            )
            for name in "qkv"
        )
        query, key = self._rotated(query), self._rotated(key)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + mixed.reshape(x.shape) @ layer["self_attn.o_proj.weight"].T
        normed = self._normed(x, layer["post_attention_layernorm.weight"])
        gate = jax.nn.silu(normed @ layer["mlp.gate_proj.weight"].T)
        up = normed @ layer["mlp.up_proj.weight"].T
        return x + (gate * up) @ layer["mlp.down_proj.weight"].T

    def _normed(self, x: Array, weight: Array) -> Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.norm_eps)
        return (wide * scale).astype(x.dtype) * weight

    def _rotated(self, x: Float[Array, "rows length heads head"]) -> Array:
        half = x.shape[-1] // 2
        frequencies = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
        cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def log_probs(model: Llama, rows: Int[Array, "rows length"], prompt: int) -> Float[Array, " rows"]:
    """The summed log-probability of each row's completion."""
    # The logits at a position predict the next token.
    logits = model(rows)[:, prompt - 1 : -1].astype(jnp.float32)  # (rows, completion, vocab)
    targets = rows[:, prompt:, None]
    chosen = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    return (chosen - jax.nn.logsumexp(logits, axis=-1)).sum(axis=-1)


def dpo(policy: Float[Array, " rows"], reference: Float[Array, " rows"], beta: float) -> Array:
    """The mean loss; the first half of the rows are the chosen sequences."""
    chosen, rejected = jnp.split(policy - reference, 2)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected)).mean()


def rows_of(problem: Problem) -> Int[np.ndarray, "rows length"]:
    """The chosen sequences, then the rejected sequences."""
    ids = token_ids(problem)
    both = [np.concatenate([ids["prompt"], ids[name]], axis=1) for name in ("chosen", "rejected")]
    return np.concatenate(both)


def training(problem: Problem, policy: Llama, reference: Llama):
    """The step that trains `policy` on the problem, and its arguments.

    **Returns:**

    The jitted step, `(frozen, model, opt_state) -> (model, opt_state, loss)`, whose arguments
    except the first are donated; and these arguments.
    """
    optimizer = optax.adamw(problem.learning_rate, weight_decay=problem.weight_decay)
    rows = rows_of(problem)

    def loss(model, rows, reference):
        if not problem.precomputed:
            reference = log_probs(reference, rows, problem.prompt)
        return dpo(log_probs(model, rows, problem.prompt), reference, problem.beta)

    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, model, opt_state):
        value, gradient = eqx.filter_value_and_grad(loss)(model, *frozen)
        updates, opt_state = optimizer.update(gradient, opt_state, model)
        return eqx.apply_updates(model, updates), opt_state, value

    if problem.precomputed:
        reference = eqx.filter_jit(log_probs)(reference, rows, problem.prompt)
    return train, ((rows, reference), policy, optimizer.init(policy))


def main() -> None:
    from safetensors.numpy import load_file

    turns = Turns(version=f"JAX {jax.__version__}")
    problem, folder = given_problem()
    policy, reference = (
        Llama(load_file(folder / name / "model.safetensors"), problem)
        for name in ("policy", "reference")
    )
    train, (frozen, model, opt_state) = training(problem, policy, reference)
    del policy, reference
    turns.begin()
    going_on = True
    while going_on:
        model, opt_state, loss = train(frozen, model, opt_state)
        going_on = turns.step_done(loss)


if __name__ == "__main__":
    main()
