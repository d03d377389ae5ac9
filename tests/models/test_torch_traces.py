"""Twenty AdamW steps on a dense decoder, a hybrid and a mixture, against a plain PyTorch loop.

`make_torch_traces.py` is the loop. The traces of TRL, in float32, are in `test_traces.py`.
"""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models

from .make_families import read_golden, write_checkpoint
from .make_torch_traces import (
    BETA,
    CASES,
    FILE,
    LEARNING_RATE,
    NAMES,
    STEPS,
    WEIGHT_DECAY,
    rows,
)


def batch_of(step):
    tokens = {
        name: dpx.Tokens(ids, np.arange(ids.shape[1]) < lengths[:, None])
        for name, (ids, lengths) in rows(step).items()
    }
    return dpx.PreferenceBatch(**tokens)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps(name, tmp_path):
    folder = write_checkpoint(read_golden()[name], tmp_path / name)
    policy = models.load(folder, dtype=jnp.float64)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    step = dpx.make_step(eqx.Partial(losses.dpo, beta=BETA), optimizer)
    reference = dpx.snapshot(policy)
    opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    arrays, static = eqx.partition((policy, opt_state), eqx.is_array)

    @jax.jit
    def run(arrays, batches):
        def body(arrays, batch):
            policy, opt_state = eqx.combine(arrays, static)
            *state, metrics = step(policy, opt_state, batch, reference)
            return eqx.filter(tuple(state), eqx.is_array), metrics

        return jax.lax.scan(body, arrays, batches)[1]

    batches = jax.tree.map(lambda *x: jnp.stack(x), *map(batch_of, range(STEPS)))
    metrics = run(arrays, batches)
    expected = json.loads(FILE.read_text())[name]
    for key in NAMES:
        want = np.asarray(expected[key])
        assert np.abs(metrics[key] - want).max() < 1e-8 * (1 + np.abs(want).max()), key
