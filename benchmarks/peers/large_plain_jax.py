"""Plain JAX at the shape of a real model: `2 * pairs` rows, the logits of all positions.

The decoder is this library's, called for logits as any Equinox model is. The step around it is
written without this library.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from benchmarks.large import Case, rows_of
from benchmarks.peers.large_ours import device_peak, policy_of
from benchmarks.peers.plain_jax import dpo
from benchmarks.turns import Turns
from benchmarks.workers import given


def log_probs(model, rows: jax.Array, prompt: int) -> jax.Array:
    """The summed log-probability of each row's completion, computed in bfloat16."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    model = eqx.combine(jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays), static)
    logits = jax.vmap(model)(rows)[:, prompt - 1 : -1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, rows[:, prompt:, None], axis=-1)[..., 0]
    return (chosen - jax.nn.logsumexp(logits, axis=-1)).sum(axis=-1)


def main() -> None:
    turns = Turns(version=f"JAX {jax.__version__}", device_peak=device_peak)
    case, _ = given(Case)
    optimizer = optax.adamw(case.learning_rate, weight_decay=case.weight_decay)

    def loss(model, rows, reference):
        expected = jax.lax.stop_gradient(log_probs(reference, rows, case.prompt))
        return dpo(log_probs(model, rows, case.prompt), expected, case.beta)

    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, model, opt_state):
        value, gradient = eqx.filter_value_and_grad(loss)(model, *frozen)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optimizer.update(gradient, opt_state, arrays)
        return eqx.apply_updates(model, updates), opt_state, value

    model = policy_of(case)
    frozen = jnp.asarray(rows_of(case)), policy_of(case)
    opt_state, going_on = optimizer.init(eqx.filter(model, eqx.is_inexact_array)), True
    turns.begin()
    while going_on:
        model, opt_state, value = train(frozen, model, opt_state)
        going_on = turns.step_done(value)


if __name__ == "__main__":
    main()
