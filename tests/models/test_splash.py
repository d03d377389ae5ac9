"""Attention through JAX's splash kernel for TPUs, which a CPU interprets step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import models
from dpo_eqx._jax import platform_rules
from dpo_eqx.models._decoder import kernels, splash
from dpo_eqx.models._decoder.attention import attend

WIDTH, SOFTCAP = 16, 3.0


@pytest.fixture
def interpreted(monkeypatch):
    """The CPU has the kernel, with blocks of 128."""
    monkeypatch.setattr(splash, "INTERPRET", True)
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)
    monkeypatch.setitem(kernels.KERNELS, "cpu", splash)
    platform_rules._run_now.clear_cache()
    yield
    platform_rules._run_now.clear_cache()


def oracle(operands, mask, softcap):
    """Grouped attention by a softmax in float64."""
    query, key, value = (x.astype(jnp.float64) for x in operands)
    key, value = (jnp.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key) * WIDTH**-0.5
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    scores = jnp.where(jnp.broadcast_to(mask[:, None], scores.shape), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("queries", "keys", "softcap", "dtype"),
    [
        (130, 201, SOFTCAP, jnp.float32),
        pytest.param(201, 201, None, jnp.float32, marks=pytest.mark.slow),
        pytest.param(130, 201, SOFTCAP, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(201, 201, None, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients(queries, keys, softcap, dtype):
    """Rows whose prompts have different lengths, in several blocks with padding."""
    config = models.Config(
        vocab=1, width=1, layers=1, heads=4, key_heads=2, head_width=WIDTH,
        attention_softcap=softcap,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    widths = (queries, 4), (keys, 2), (keys, 2)
    operands = [jnp.asarray(rng.normal(size=(2, *x, WIDTH)), dtype) for x in widths]
    prompt = keys - queries
    seen = jnp.tri(queries, keys, prompt, dtype=bool)
    masks = jnp.stack([seen.at[:, real:prompt].set(False) for real in (prompt - 9, prompt)])
    given = None if queries == keys else masks

    def ours(*operands):
        def row(mask, *operands):
            return attend(*(x[None] for x in operands), mask, config=config, form="keys")[0]

        return jax.vmap(row, (None if given is None else 0, 0, 0, 0))(given, *operands)

    def slopes(function):
        weights = jnp.asarray(np.random.default_rng(1).normal(size=operands[0].shape))

        def total(*operands):
            output = function(*operands)
            return (weights * output.astype(jnp.float64)).sum(), output

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*operands)

    ((_, got), got_slopes), ((_, want), want_slopes) = map(
        slopes, (ours, lambda *x: oracle(x, masks, softcap))
    )
    for a, b in zip((got, *got_slopes), (want, *want_slopes), strict=True):
        error = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        # A number in bfloat16 is rounded by up to 4e-3 of itself.
        size = np.abs(error).max() if dtype == jnp.float32 else np.sqrt((error**2).mean())
        assert size < (1e-6 if dtype == jnp.float32 else 1e-3) * np.abs(np.asarray(b)).max()
