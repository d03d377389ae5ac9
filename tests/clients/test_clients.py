"""Models of other people's packages, each trained for 20 steps through its documented call.

The packages are not needed by the other tests: `tests/clients/run` installs them.
"""

import functools
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


def eqx_zoo(**mixture):
    """A causal language model that returns a cache beside the logits."""
    import eqx_zoo
    from eqx_zoo.models.causal_lm import Config

    config = Config(
        "Qwen3ForCausalLM", vocab_size=32, hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True, attention_bias=False,
        qk_norm=True, rope_scaling=None, **mixture,
    )  # fmt: skip
    model = eqx_zoo.CausalLM(config, key=KEY)
    return Client(dpx.adapt(model, lambda model, ids, key: model(ids)[0]), 32)


def eqx_zoo_mixture():
    """A mixture of experts, whose grouped product cannot be mapped by `vmap`."""
    client = eqx_zoo(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_layers=(0, 1)
    )
    return client._replace(score=functools.partial(dpx.score_pairs, how="map"))


def lalamo():
    """A Llama that takes a batch, positions and keys, and computes in bfloat16 inside."""
    from lalamo.initializer import RandomInitializer
    from lalamo.model_import.model_configs.huggingface.llama import HFLlamaConfig
    from lalamo.modules import DecoderForwardPassConfig, Keychain
    from lalamo.utils.sharding import ShardingConfig

    config = HFLlamaConfig(
        "float32", ["LlamaForCausalLM"], vocab_size=32, hidden_size=16, intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6,
        rope_theta=1e4, rope_scaling=None, max_position_embeddings=16, tie_word_embeddings=True,
        attention_bias=False, mlp_bias=False, attention_dropout=0.0, hidden_act="silu",
        initializer_range=0.02, bos_token_id=1, eos_token_id=2, model_type="llama",
        pretraining_tp=1, transformers_version="", use_cache=False,
    )  # fmt: skip
    one_device = ShardingConfig.replicated()
    initializer = RandomInitializer(jnp.float32, one_device, key=KEY)
    model = config.to_decoder_config({}).init(initializer)
    keychain = Keychain.init(0, sharding_config=one_device)
    settings = DecoderForwardPassConfig.for_training()

    # The checkpoint makes the policy and the reference round alike, in bfloat16.
    @eqx.filter_checkpoint
    def call(model, ids, key):
        positions = jnp.arange(ids.size)[None]
        output = model(ids[None], positions, forward_pass_config=settings, keychain=keychain)
        return output.logits[0]

    return Client(dpx.adapt(model, call), 32)


def discretax():
    """A stack of linear recurrent units with BatchNorm, which takes vectors, a state and a key."""
    from discretax.encoder import EmbeddingEncoder
    from discretax.models import LRU

    layers = [functools.partial(EmbeddingEncoder, out_features=16, num_classes=32)]
    layers += [functools.partial(LRU, hidden_dim=16, num_blocks=2, state_dim=8)]
    make = eqx.nn.make_with_state(lambda: eqx.nn.Sequential([layer(KEY) for layer in layers]))
    body, state = make()
    # One batch fills the running statistics, which are those of a trained model.
    ids = jax.random.randint(KEY, (8, 16), 0, 32)
    _, state = jax.vmap(
        lambda ids, state: body(ids, state, key=KEY),
        in_axes=(0, None), out_axes=(0, None), axis_name="batch",
    )(ids, state)  # fmt: skip
    both = eqx.nn.inference_mode(body), eqx.nn.Linear(16, 32, key=KEY)

    def call(both, ids, key):
        body, head = both
        hidden, _ = body(ids, jax.tree.map(jnp.copy, state), key=KEY)
        return jax.vmap(head)(hidden)

    return Client(dpx.adapt(both, call), 32)


# The package of each model; it is imported in the test.
CLIENTS = {
    megalodon: "megalodon_jax",
    megalodon_of_a_batch: "megalodon_jax",
    rnn_jax: "rnn_jax",
    memax: "memax",
    esm2quinox: "esm2quinox",
    e1jax: "e1jax",
    eqx_zoo: "eqx_zoo",
    eqx_zoo_mixture: "eqx_zoo",
    lalamo: "lalamo",
    discretax: "discretax",
}


@pytest.fixture(autouse=True)
def _as_users_run():
    """In float32 with JAX's usual promotion. Some of the packages change JAX's settings."""
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
