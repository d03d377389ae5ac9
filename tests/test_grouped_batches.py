"""Products of rows in groups as one batched product, as on NVIDIA GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx._jax.grouped_batches import dot_in_batches, outer_in_batches
from dpo_eqx._jax.grouped_dot import grouped_dot

from .policies import assert_close

OUT, IN = 3, 2


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((9, 0, 17, 14), id="blocks of 8"),
        pytest.param((0, 40, 0, 0), id="one group has all"),
        pytest.param((3, 0, 8, 5), id="rows behind all groups"),
        pytest.param((1, 0, 0, 1, 0, 0, 0), id="fewer rows than groups"),
    ],
)
def test_products_of_sorted_rows(sizes):
    rows, groups = max(sum(sizes), 40 if len(sizes) == 4 else 0), len(sizes)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, IN)), rng.normal(size=(rows, OUT))
    matrices = rng.normal(size=(groups, OUT, IN))
    group = np.repeat(np.arange(groups), sizes)
    counts, used = jnp.asarray(sizes, jnp.int32), len(group)
    dot = jax.jit(dot_in_batches)(jnp.asarray(x), jnp.asarray(matrices), counts)
    assert_close(dot[:used], np.einsum("ri,roi->ro", x[:used], matrices[group]), 1e-14)
    outer = jax.jit(outer_in_batches)(jnp.asarray(y), jnp.asarray(x), counts)
    want = [y[:used][group == g].T @ x[:used][group == g] for g in range(groups)]
    assert_close(outer, np.stack(want), 1e-14)


def test_a_gpu_gets_them():
    """XLA would multiply every row by every matrix for JAX's `ragged_dot`."""

    def total(x, matrices, group):
        return grouped_dot(x, matrices, group).sum()

    shapes = (40, IN), (4, OUT, IN)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    group = jax.ShapeDtypeStruct((40,), jnp.int32)
    traced = jax.jit(jax.value_and_grad(total, (0, 1))).trace(*operands, group)
    for platform, is_ragged in {"cuda": False, "tpu": True, "cpu": False}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("ragged_dot" in text) == is_ragged
