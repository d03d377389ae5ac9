"""On-policy training: the page's example, and a bandit whose optimum is known."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from benchmarks import bandit
from dpo_eqx import losses, models

from .pages.fences import DOCS, blocks
from .policies import Perceptron, assert_close, random_batch

pytestmark = pytest.mark.usefixtures("standard_promotion")
PAGE = DOCS / "online.md"


@pytest.fixture
def standard_promotion():
    # Optax itself does not keep to strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_page_trains_towards_the_reward():
    first, *_, noise = blocks(PAGE, "python")
    optimizer = optax.adam(0.03)
    names = {
        "dpx": dpx,
        "losses": losses,
        "models": models,
        "eqx": eqx,
        "jax": jax,
        "optimizer": optimizer,
        # The fraction of tokens with an id below 4.
        "reward": lambda prompt, tokens: (
            (tokens.mask & (tokens.ids < 4)).sum(-1) / tokens.mask.sum(-1)
        ),
    }
    exec(first, names)
    policy = Perceptron(jax.random.key(0))
    reference, prompt = dpx.snapshot(policy), random_batch(0, pairs=8).prompt
    opt_state = optimizer.init(eqx.filter(policy, eqx.is_array))

    def mean_reward(policy):
        key = jax.random.key(9)
        drawn = models.sample(policy, prompt, samples=16, max_new_tokens=16, eos=2, key=key)
        return names["reward"](prompt, drawn.tokens).mean()

    before = mean_reward(policy)
    for key in jax.random.split(jax.random.key(1), 15):
        policy, opt_state, _ = names["one_round"](policy, opt_state, prompt, reference, key)
    assert mean_reward(policy) > before + 0.2
    exec(noise, names | {"rewards": jnp.zeros((2, 3)), "key": jax.random.key(0)})


def test_the_page_gives_a_policy_a_head_and_adapters():
    policy = models.Transformer(
        models.Config(vocab=8, width=8, layers=1, heads=2), key=jax.random.key(0)
    )
    names = {"dpx": dpx, "losses": losses, "models": models, "optimizer": optax.sgd(0.1)}
    names |= {"policy": policy, "key": jax.random.key(1)}
    head, adapters = (b for b in blocks(PAGE, "python") if "policy, key" in b or "add_lora" in b)
    exec(head, names)
    exec(adapters, names)
    assert isinstance(names["reward_model"], models.RewardModel)
    selected = eqx.filter(names["reward_model"], models.lora_filter(names["reward_model"]))
    assert sum(x.size for x in jax.tree.leaves(selected.head)) > 0


@pytest.mark.slow
def test_the_page_has_a_round_of_xpo():
    """One step of SGD, by hand: the gradient of DPO, and `alpha` times that of log pi(y_ref)."""
    (block,) = (block for block in blocks(PAGE, "python") if "xpo_step" in block)
    drawn, alpha = [], 0.5

    def reward(prompt, tokens):
        drawn.append(tokens)
        return (tokens.mask & (tokens.ids < 4)).sum(-1)

    names = {"dpx": dpx, "models": models, "eqx": eqx, "jax": jax, "jnp": jnp, "losses": losses}
    names |= {"dataclasses": dataclasses, "partial": partial, "reward": reward}
    names |= {"optimizer": optax.sgd(1.0)}
    # Without `jit`, so that what was drawn can be read.
    exec(block.replace("1e-5", str(alpha)).replace("@eqx.filter_jit", ""), names)
    policy, reference = (Perceptron(jax.random.key(i)) for i in (0, 1))
    prompt, opt_state = random_batch(0, pairs=6).prompt, optax.sgd(1.0).init(())
    key = jax.random.key(11)
    got, _, _ = names["xpo_round"](policy, opt_state, prompt, reference, key)
    (tokens,) = drawn
    # 1 if the policy's sample has the larger reward, and -1 if the reference's has it.
    sign = np.sign(np.asarray(reward(prompt, tokens)) @ np.array([1, -1]))
    assert {-1, 1} <= set(sign)
    sides = (dpx.Tokens(tokens.ids[:, i], tokens.mask[:, i]) for i in (0, 1))
    ours, theirs = (dpx.UnpairedBatch(prompt, side, np.ones(6, bool)) for side in sides)

    @eqx.filter_jit
    @eqx.filter_grad
    def by_hand(policy):
        def log_ratio(batch):
            scores = (dpx.score_unpaired(model, batch).completion for model in (policy, reference))
            return jnp.subtract(*scores)

        each = jnp.log1p(jnp.exp(-0.1 * sign * (log_ratio(ours) - log_ratio(theirs))))
        each += alpha * dpx.score_unpaired(policy, theirs).completion
        return (each * abs(sign)).sum() / abs(sign).sum()

    want = eqx.apply_updates(policy, jax.tree.map(lambda g: -g, by_hand(policy)))
    assert_close(got, want, 1e-10)


class Bandit(eqx.Module):
    """One token after any prompt, with a logit for each id."""

    logits: jax.Array

    def __call__(self, ids):
        return jnp.broadcast_to(self.logits, (len(ids), *self.logits.shape))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["random", "all"])
def test_a_bandit_reaches_the_optimum_of_dpo(how):
    """Online DPO with preferences of the Bradley-Terry model finds pi_ref exp(r / beta) / Z."""
    beta, arms, prompts = 0.5, 6, 256
    reference = Bandit(jax.random.normal(jax.random.key(0), (arms,)))
    rewards = jax.random.normal(jax.random.key(1), (arms,))
    optimum = jax.nn.softmax(reference.logits + rewards / beta)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 800))
    step = dpx.make_step(losses.dpo, optimizer, score=dpx.score_pairs)
    prompt = dpx.Tokens(jnp.zeros((prompts, 1), jnp.int32), jnp.ones((prompts, 1), bool))

    def one_round(carry, key):
        policy, opt_state = carry
        keys = jax.random.split(key, 3)
        drawn = models.sample(policy, prompt, samples=4, max_new_tokens=1, key=keys[0])
        seen = rewards[drawn.tokens.ids[..., 0]]
        noisy = seen + jax.random.gumbel(keys[1], seen.shape)
        # The same arm twice is no preference: its rewards differ by noise alone.
        batch = dpx.pair_samples(prompt, drawn, noisy, how=how, key=keys[2])
        per_pair = {"beta": jnp.full(batch.pairs, beta)}
        batch = eqx.tree_at(lambda b: b.per_pair, batch, per_pair, is_leaf=lambda x: x is None)
        policy, opt_state, _ = step(policy, opt_state, batch, reference)
        return (policy, opt_state), None

    start = Bandit(jnp.zeros(arms) + reference.logits)
    keys = jax.random.split(jax.random.key(2), 800)
    (policy, _), _ = jax.jit(lambda carry: jax.lax.scan(one_round, carry, keys))(
        (start, optimizer.init(start))
    )
    distance = 0.5 * jnp.abs(jax.nn.softmax(policy.logits) - optimum).sum()
    assert distance < 0.02
    # Not vacuous: the reference is far from the optimum.
    assert 0.5 * jnp.abs(jax.nn.softmax(reference.logits) - optimum).sum() > 0.2
    assert np.isfinite(policy.logits).all()


@pytest.mark.slow
def test_online_reaches_an_optimum_that_offline_does_not():
    """The bandit of the figure: the best token has a probability of 0.0002 under the reference."""
    key = jax.random.key(0)
    distances = {
        is_online: float(bandit.distance(bandit.train(key, is_online=is_online)[-1]))
        for is_online in (False, True)
    }
    assert distances[True] < 0.02
    assert distances[False] > 0.1
    # pi_ref exp(r / beta) / Z by a calculator.
    want = [0.3644, 0.2736, 0.0839, 0.0247, 0.2489, 0.0045]
    np.testing.assert_allclose(bandit.optimum(), want, atol=1e-4)
