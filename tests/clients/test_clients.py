"""Models of other people's packages, each trained for 20 steps through its documented call.

The packages are not needed by the other tests: `tests/clients/run` installs them.
"""

import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses

KEY = jax.random.key(0)
STEPS = 20


class Client(NamedTuple):
    """A policy, the number of its tokens, and its score."""

    policy: Any
    vocab: int
    score: Any = dpx.score_pairs


def megalodon():
    """A causal language model that takes a batch, a key, and a flag for dropout."""
    import megalodon_jax

    config = megalodon_jax.MegalodonConfig(
        vocab_size=32, model_dim=16, num_layers=2, num_heads=1, z_dim=8, value_dim=16,
        ffn_hidden_dim=16, cema_ndim=2, chunk_size=16, norm_num_groups=4,
    )  # fmt: skip
    model = megalodon_jax.MegalodonForCausalLM(config, key=KEY)
    return Client(dpx.adapt(model, lambda model, ids, key: model(ids[None])[0][0]), 32)


def megalodon_of_a_batch():
    """The same model, run on the whole batch at once."""
    policy = megalodon().policy.model

    def call(model, ids, key):
        return model(ids)[0]

    def score(policy, batch, *, key=None):
        return dpx.score_pairs(policy, batch, key=key, how="batch")

    return Client(dpx.adapt(policy, call), 32, score)


def rnn_jax():
    """A linear recurrent unit, which takes vectors: the embedding is the user's."""
    from rnn_jax.ssm.lru import LinearRecurrentUnit
    from rnn_jax.ssm.mixers import GLUMixer
    from rnn_jax.ssm.models import DeepStateSpaceModelEncoder

    layers = [LinearRecurrentUnit(16, 16, 16, key=KEY)]
    mixers = [GLUMixer(16, 16, key=KEY)]
    model = DeepStateSpaceModelEncoder(16, layers, mixers, out_dim=32, key=KEY)
    both = (eqx.nn.Embedding(32, 16, key=KEY), model)
    return Client(dpx.adapt(both, lambda both, ids, key: both[1](jax.vmap(both[0])(ids))), 32)


def memax():
    """A selective state-space model, which takes a carry, and vectors with marks of starts."""
    from memax.equinox.train_utils import get_residual_memory_model

    model = get_residual_memory_model("S6", input=32, hidden=16, output=32, key=KEY)

    def call(model, ids, key):
        inputs = jax.nn.one_hot(ids, 32), jnp.zeros(ids.shape, bool)
        return model(model.initialize_carry(), inputs)[1]

    return Client(dpx.adapt(model, call), 32)


def esm2quinox():
    """A masked protein model: the pseudo-log-likelihood, in rows without padding."""
    import esm2quinox

    model = esm2quinox.ESM2(num_layers=2, embed_size=16, num_heads=2, token_dropout=False, key=KEY)
    policy = dpx.adapt(model, lambda model, ids, key: model(ids).logits)
    return Client(policy, 32, dpx.pseudo_score(mask_id=32))


def e1jax():
    """A masked protein model that takes positions, sequence numbers and a mask of padding."""
    import e1jax

    model = e1jax.E1(16, 2, 32, 2, key=KEY)

    def call(model, ids, key):
        positions = jnp.arange(ids.size, dtype=jnp.int32)
        return model(ids, positions, positions, jnp.zeros_like(ids), ids != 0)[0]

    return Client(dpx.adapt(model, call), 32, dpx.pseudo_score(mask_id=5))


# The package of each model; it is imported in the test.
CLIENTS = {
    megalodon: "megalodon_jax",
    megalodon_of_a_batch: "megalodon_jax",
    rnn_jax: "rnn_jax",
    memax: "memax",
    esm2quinox: "esm2quinox",
    e1jax: "e1jax",
}


@pytest.fixture(autouse=True)
def _as_users_run():
    """In float32 with JAX's usual promotion. One of the packages switches `jax_debug_nans` on."""
    before = jax.config.jax_debug_nans
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
    jax.config.update("jax_debug_nans", before)


def random_pairs(vocab, pairs=4, length=6):
    """Pairs of full rows, so that masked models see no padding."""
    rng = np.random.default_rng(0)
    mask = np.ones((pairs, length), bool)
    return dpx.PreferenceBatch(
        *(dpx.Tokens(rng.integers(8, vocab, mask.shape), mask) for _ in range(3))
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # warnings of the packages are theirs
@pytest.mark.parametrize("make", CLIENTS, ids=lambda make: make.__name__)
def test_twenty_steps(make):
    pytest.importorskip(CLIENTS[make], reason="`tests/clients/run` installs it")
    policy, vocab, score = make()
    reference, batch = dpx.snapshot(policy), random_pairs(vocab)
    optimizer = optax.adam(1e-3)
    step = eqx.filter_jit(dpx.make_step(losses.dpo, optimizer, score=score))
    opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    seen, begin = [], time.process_time()
    for _ in range(STEPS):
        policy, opt_state, metrics = step(policy, opt_state, batch, reference)
        seen.append(float(metrics["loss"]))
    seconds = time.process_time() - begin
    # Client, first loss, last loss, and seconds of CPU with compilation.
    print(f"| {make.__name__} | {seen[0]:.6f} | {seen[-1]:.4f} | {seconds:.1f} |")
    assert seen[0] == pytest.approx(np.log(2), abs=1e-6)
    assert seen[-1] < seen[0] - 1e-3
