"""Recurrent policies: prompts are read once, with the result of the plain call."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models
from dpo_eqx._policies.probes import Probe
from dpo_eqx._policies.recurrence_probe import check_recurrence

from .policies import VOCAB, Attention, Plain, assert_close, random_batch, random_tokens
from .recurrent_policies import LRU, Mamba
from .test_score import gappy

KEY = jax.random.key(0)
POLICIES = {"mamba": Mamba(KEY), "lru": LRU(KEY)}
BATCH = gappy(random_batch(2))
score = eqx.filter_jit(dpx.score_pairs)


# Each test takes seconds to compile, so most of them are slow ones.
@pytest.fixture(params=["lru", pytest.param("mamba", marks=pytest.mark.slow)])
def policy(request):
    return POLICIES[request.param]


def objective(policy, batch):
    scored = dpx.score_pairs(policy, batch, confidence=True)
    weights = jnp.arange(8.0)
    return (weights * (scored.chosen - 2 * scored.rejected)).sum(), scored


value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(objective, has_aux=True))


def test_scores_and_gradients_equal_the_plain_call(policy):
    (_, got), gradient = value_and_grad(policy, BATCH)
    (_, want), plain_gradient = value_and_grad(Plain(policy), BATCH)
    assert_close(got, want, 1e-10)
    assert_close(gradient, plain_gradient.policy, 1e-10)


def test_each_prompt_is_read_once(policy):
    calls = []

    class Recorded(type(policy)):
        def __call__(self, ids, *, key=None):
            raise AssertionError("the plain call is not needed")

        def start(self, ids, length, *, key=None):
            calls.append(("start", ids.size))
            return super().start(ids, length, key=key)

        def extend(self, state, ids, *, key=None):
            calls.append(("extend", ids.size))
            return super().extend(state, ids, key=key)

    eqx.filter_eval_shape(dpx.score_pairs, Recorded(KEY), random_batch())
    # Traced once for all prompts, and once for both completions of each.
    assert calls == [("start", 5), ("extend", 6)]


@pytest.mark.slow
def test_the_width_of_the_padding_changes_nothing(policy):
    def wider(tokens, by):
        pad = [(0, 0), (0, by)]
        return dpx.Tokens(np.pad(tokens.ids, pad, constant_values=9), np.pad(tokens.mask, pad))

    padded = dataclasses.replace(
        BATCH,
        prompt=wider(BATCH.prompt, 3),
        chosen=wider(BATCH.chosen, 4),
        rejected=wider(BATCH.rejected, 4),
    )
    assert_close(score(policy, padded), score(policy, BATCH), 1e-12)


@pytest.mark.slow
def test_unpaired_completions_of_two_widths(policy):
    batch = dpx.UnpairedBatch(
        BATCH.prompt,
        BATCH.chosen,
        np.arange(8) % 2 == 0,
        kl=random_tokens(np.random.default_rng(3), np.ones((8, 4), bool)),
    )
    run = eqx.filter_jit(dpx.score_unpaired)
    assert_close(run(policy, batch), run(Plain(policy), batch), 1e-10)


@pytest.mark.slow
def test_completions_of_one_token(policy):
    chosen, rejected = jax.tree.map(lambda x: x[:, :1], (BATCH.chosen, BATCH.rejected))
    batch = dataclasses.replace(BATCH, chosen=chosen, rejected=rejected)
    assert_close(score(policy, batch), score(Plain(policy), batch), 1e-10)


@pytest.mark.slow
def test_microbatches_change_nothing_and_keys_are_those_of_the_pairs():
    policy, batch = LRU(KEY, rate=0.25), random_batch()
    grad = eqx.filter_jit(dpx.make_grad(losses.dpo, microbatches=4))
    whole = eqx.filter_jit(dpx.make_grad(losses.dpo))
    assert_close(grad(policy, batch, policy, key=KEY), whole(policy, batch, policy, key=KEY), 1e-12)


@pytest.mark.slow
def test_dropout_is_drawn_for_each_completion():
    policy = LRU(KEY, rate=0.25)
    batch = random_batch()
    batch = dataclasses.replace(batch, rejected=batch.chosen)
    noisy = score(policy, batch, key=KEY)
    # A completion of one token is predicted from the prompt alone, which both have in common.
    several = np.asarray(noisy.chosen_length) > 1
    assert (np.asarray(abs(noisy.chosen - noisy.rejected) > 1e-6) == several).all()
    assert len(set(np.asarray(noisy.chosen).tolist())) == 8


@pytest.mark.slow
def test_a_step_starts_at_log_2_and_trains(policy, standard_promotion):
    optimizer = optax.adam(1e-2)
    step = eqx.filter_jit(dpx.make_step(losses.dpo, optimizer))
    state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    trained, seen = policy, []
    for _ in range(5):
        trained, state, metrics = step(trained, state, BATCH, policy)
        seen.append(float(metrics["loss"]))
    assert abs(seen[0] - np.log(2)) < 1e-12
    assert seen[-1] < 0.6


@pytest.mark.slow
def test_the_comparison_is_that_of_the_plain_call(policy):
    other = jax.tree.map(lambda x: x * 1.1, policy)
    run = eqx.filter_jit(dpx.compare)
    assert_close(run(policy, other, BATCH), run(Plain(policy), Plain(other), BATCH), 1e-10)
    assert_close(run(policy, Plain(other), BATCH), run(policy, other, BATCH), 1e-10)


def test_a_fast_policy_is_scored_by_its_hidden_states():
    class Both(Attention):
        def start(self, ids, length, *, key=None):
            raise AssertionError

        extend = start

    eqx.filter_eval_shape(dpx.score_pairs, Both(KEY), BATCH)


# What `start` and `extend` return in place of a state and hidden states.
WRONG = {
    "start: hidden alone": ("start", lambda s, h: h, r"got \(6,\) in float64.*as a tuple"),
    "start: turned": ("start", lambda s, h: (h, s), "Return the state first"),
    "start: all tokens": ("start", lambda s, h: (s, h[None]), r"alone: `hidden\[length - 1\]`"),
    "start: three": ("start", lambda s, h: (s, h, h), "got a tuple of 3.*as a tuple"),
    "extend: turned": ("extend", lambda s, h: (h, s), "Return the state first"),
    "extend: last": ("extend", lambda s, h: (s, h[-1]), "every token, not only of the last"),
    "extend: one less": ("extend", lambda s, h: (s, h[1:]), r"here \(6, 6\).*got .*\(5, 6\)"),
    "extend: integers": ("extend", lambda s, h: (s, h.astype(int)), "must be real"),
    "extend: list": ("extend", lambda s, h: [s, h], "got a list of 2.*as a tuple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_name_the_class_and_a_remedy(name):
    method, change, message = WRONG[name]

    class Mistaken(LRU):
        def start(self, ids, length, *, key=None):
            returned = super().start(ids, length)
            return change(*returned) if method == "start" else returned

        def extend(self, state, ids, *, key=None):
            returned = super().extend(state, ids)
            return change(*returned) if method == "extend" else returned

    run = eqx.filter_eval_shape
    with pytest.raises(ValueError, match=f"(?s)`policy.{method}.*from Mistaken.*") as caught:
        run(dpx.score_pairs, Mistaken(KEY), BATCH)
    assert caught.match(f"(?s){message}")
    with pytest.raises(ValueError, match=f"`reference.{method}"):
        run(dpx.make_grad(losses.dpo), LRU(KEY), BATCH, Mistaken(KEY))


def test_an_error_of_the_policy_says_how_it_was_called():
    class Narrow(LRU):
        def start(self, ids):
            return super().start(ids, ids.size)

    with pytest.raises(TypeError) as caught:
        dpx.score_pairs(Narrow(KEY), BATCH)
    assert "`policy.start(ids, length)` of class Narrow" in caught.value.__notes__[0]


# Drawing tokens


OPTIONS = {"samples": 3, "max_new_tokens": 9, "key": jax.random.split(KEY, 8), "eos": 5}


@pytest.mark.parametrize("temperature", [pytest.param(0, marks=pytest.mark.slow), 1.3])
def test_the_draw_is_that_of_the_plain_call(policy, temperature):
    options = {**OPTIONS, "temperature": temperature, "samples": 1 if temperature == 0 else 3}
    got = models.sample(policy, BATCH.prompt, **options)
    want = models.sample(Plain(policy), BATCH.prompt, **options)
    np.testing.assert_array_equal(got.tokens.mask, want.tokens.mask)
    np.testing.assert_array_equal(got.tokens.ids, want.tokens.ids)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=1e-10)
    rows = np.asarray(got.tokens.ids).reshape(-1, 9)
    assert len({row.tobytes() for row in rows}) > len(rows) / 3
    assert temperature == 0 or got.tokens.mask.mean() < 1


@pytest.mark.slow
def test_generate_is_the_first_sample(policy):
    options = {name: value for name, value in OPTIONS.items() if name != "samples"}
    got = models.generate(policy, BATCH.prompt, **options)
    want = models.sample(policy, BATCH.prompt, **OPTIONS).tokens
    np.testing.assert_array_equal(got.ids, want.ids[:, 0])


@pytest.mark.slow
def test_a_state_that_grows_cannot_draw_but_the_remedy_can():
    class Growing(LRU):
        """Its state is all ids so far."""

        def start(self, ids, length, *, key=None):
            ids = jnp.where(jnp.arange(ids.size, dtype=length.dtype) < length, ids, 0)
            return (ids, length), super().start(ids, length)[1]

        def extend(self, state, ids, *, key=None):
            before, length = state
            row = jnp.concatenate([before, jnp.zeros_like(ids)])
            row = jax.lax.dynamic_update_slice(row, ids, (length,))
            hidden = self.read(self.zeros(), row)[1]
            own = jax.lax.dynamic_slice_in_dim(hidden, length, ids.size)
            return (row, length + ids.size), own

    policy = Growing(KEY)
    assert_close(score(policy, BATCH), score(LRU(KEY), BATCH), 1e-10)
    message = r"same structure, shapes and dtypes.*\(6,\) in int32 from \(5,\).* Growing"
    with pytest.raises(ValueError, match=message):
        models.sample(policy, BATCH.prompt, **OPTIONS)
    remedy = dpx.adapt(policy, lambda policy, ids, key: policy(ids))
    got = models.sample(remedy, BATCH.prompt, **OPTIONS)
    want = models.sample(LRU(KEY), BATCH.prompt, **OPTIONS)
    np.testing.assert_array_equal(got.tokens.ids, want.tokens.ids)


# `check_policy`


def transformer(**options):
    config = models.Config(vocab=VOCAB, width=8, heads=2, layers=2, **options)
    policy = models.Transformer(config, key=KEY)
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, policy)


def faulty(**methods):
    return type("Faulty", (Mamba,), methods)(KEY)


def start_with(change):
    def start(self, ids, length, *, key=None):
        return change(self, ids, length)

    return {"start": start}


def extend_with(change):
    def extend(self, state, ids, *, key=None):
        return change(self, state, ids)

    return {"extend": extend}


def capped(self, ids, *, key=None):
    """The plain call has a soft cap that the attribute `softcap` does not say."""
    return 2 * jnp.tanh(Mamba.__call__(self, ids) / 2)


def no_carry(self, state, ids):
    _, hidden = Mamba.extend(self, state, ids)
    return state, hidden


FAULTS = {
    "the padding is read": start_with(lambda self, ids, length: Mamba.start(self, ids, ids.size)),
    "the state of the padding": start_with(
        lambda self, ids, length: (
            Mamba.start(self, ids, ids.size)[0],
            Mamba.start(self, ids, length)[1],
        )
    ),
    "a token too early": start_with(
        lambda self, ids, length: (
            Mamba.start(self, ids, length)[0],
            Mamba.start(self, ids, length - 1)[1],
        )
    ),
    "the state is not used": extend_with(
        lambda self, state, ids: Mamba.extend(self, self.zeros(), ids)
    ),
    "the convolution starts anew": extend_with(
        lambda self, state, ids: Mamba.extend(
            self,
            [(zeros, memory) for (_, memory), (zeros, _) in zip(state, self.zeros(), strict=True)],
            ids,
        )
    ),
    "the state is not extended": extend_with(no_carry),
    "the hidden states are shifted": extend_with(
        lambda self, state, ids: (
            Mamba.extend(self, state, ids)[0],
            jnp.roll(Mamba.extend(self, state, ids)[1], 1, axis=0),
        )
    ),
    "another soft cap": {"__call__": capped},
}


QUICK = {"the state of the padding"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS]
)
def test_check_policy_finds(name):
    # The report of all checks takes longer.
    probe = Probe(faulty(**FAULTS[name]), np.arange(8, dtype=np.int32), VOCAB, KEY, True, None)
    (found,) = check_recurrence(probe)
    assert "`start` and `extend` disagree" in found


@pytest.mark.slow
def test_check_policy_finds_nothing_in_good_ones():
    for policy in (*POLICIES.values(), transformer()):
        probe = Probe(policy, np.arange(8, dtype=np.int32), VOCAB, KEY, True, None)
        assert not list(check_recurrence(probe))


@pytest.mark.slow
def test_the_report_of_a_recurrent_policy(policy):
    report = dpx.check_policy(policy, VOCAB, length=8)
    report.raise_if_problems()
    assert "start and extend" in report.passed
    assert "It offers `RecurrentPolicy`" in str(report)
    problems = dpx.check_policy(faulty(**FAULTS["another soft cap"]), VOCAB, length=8).problems
    assert any("`start` and `extend` disagree" in problem for problem in problems)
