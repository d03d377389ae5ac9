"""Entropy, token accuracy and mean logits, from tiles and from all logits, against NumPy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, losses, sharding
from dpo_eqx._head.linear import with_statistics
from dpo_eqx._head.statistics import statistics_of
from dpo_eqx._head.tiles import Unembedding

from .policies import Attention, Plain, assert_close, random_batch

NAMES = ("entropy", "accuracy", "logits")
WIDTH, VOCAB = 6, 37


def head(seed=0, softcap=None):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(VOCAB, WIDTH)) * 3, rng.normal(size=VOCAB)
    return Unembedding.of(weight, bias, softcap)


def oracle(logits, targets):
    """The three statistics of each row of logits, in NumPy."""
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    entropy = -(probs * np.log(probs)).sum(-1)
    return entropy, logits.argmax(-1) == targets, logits.mean(-1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_tiles_against_numpy(softcap, chunk_size, monkeypatch):
    """With few logits at once there are several parts, of which the last overlaps the one before.

    Half of the targets are the likeliest tokens.
    """
    monkeypatch.setattr("dpo_eqx._head.tiling.LOGITS_AT_ONCE", {"cpu": 40})
    rng = np.random.default_rng(1)
    hidden, unembedding = rng.normal(size=(2, 5, WIDTH)) * 2, head(softcap=softcap)
    logits = np.asarray(unembedding.logits(jnp.asarray(hidden.reshape(-1, WIDTH)))).reshape(
        2, 5, VOCAB
    )
    targets = rng.integers(0, VOCAB, (2, 5))
    targets[:, ::2] = logits.argmax(-1)[:, ::2]
    entropy, correct, mean = oracle(logits, targets)
    assert 0 < correct.sum() < correct.size
    run = jax.jit(lambda h, t: with_statistics(h, unembedding, t, NAMES, chunk_size))
    log_probs, tiled = run(hidden, targets)
    for got in (tiled, statistics_of(jnp.asarray(logits), jnp.asarray(targets, jnp.int32), NAMES)):
        assert_close(
            vars(got), {"entropy": entropy, "correct": correct * 1.0, "mean_logit": mean}, 1e-13
        )
    alone = dpx.linear_token_log_probs(
        hidden, unembedding.weight, targets, bias=unembedding.bias, softcap=softcap
    )
    assert np.abs(log_probs - alone).max() < 1e-12


def test_confident_predictions():
    """At logits of thousands the entropy is 0, not NaN; equal logits have the entropy log V."""
    hidden = jnp.asarray([[[1e4], [0.0]]])
    unembedding = Unembedding.of(np.linspace(-1, 1, VOCAB)[:, None], None, None)
    _, got = with_statistics(hidden, unembedding, jnp.array([[VOCAB - 1, 3]]), NAMES, None)
    want = {"entropy": [[0, np.log(VOCAB)]], "correct": [[1.0, 1.0]], "mean_logit": [[0.0, 0.0]]}
    assert_close(
        vars(got), jax.tree.map(np.array, want, is_leaf=lambda x: isinstance(x, list)), 1e-11
    )


def test_gradients_are_the_same_with_statistics():
    rng = np.random.default_rng(2)
    hidden, targets = rng.normal(size=(4, WIDTH)), rng.integers(0, VOCAB, 4)

    def total(hidden, unembedding, wanted):
        log_probs, statistics = with_statistics(hidden, unembedding, targets, wanted, None)
        return log_probs.sum() + sum(x.sum() for x in jax.tree.leaves(statistics))

    hidden = jnp.asarray(hidden)
    slopes = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    gradients = [slopes(hidden, head(), wanted) for wanted in ((), NAMES)]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.array_equal(one, other)
        assert np.abs(one).max() > 0.1


POLICY = Attention(jax.random.key(0), dtype=jnp.float64)
WEIGHT = np.random.default_rng(4).uniform(0.5, 2.0, 8)
BATCH = random_batch(3, weight=WEIGHT)
WITH_METRICS = functools.partial(dpx.score_pairs, metrics=NAMES)


def expected(policy, batch, weights=WEIGHT):
    """The means over tokens in NumPy, one sequence after the other, with the weights of pairs."""
    found = {"chosen": [], "rejected": []}
    for row in range(batch.pairs):
        prompt = batch.prompt.ids[row][batch.prompt.mask[row]]
        for side in found:
            tokens = getattr(batch, side)
            answer = tokens.ids[row][tokens.mask[row]]
            logits = np.asarray(policy(jnp.asarray(np.concatenate([prompt, answer]))))
            each = oracle(logits[prompt.size - 1 : -1], answer)
            weight = np.full(answer.size, weights[row])
            found[side].append(np.stack([*each, weight]))
    chosen, rejected = (np.concatenate(found[side], axis=1) for side in found)
    both = np.concatenate([chosen, rejected], axis=1)
    return {
        "entropy": np.average(both[0], weights=both[3]),
        "mean_token_accuracy": np.average(chosen[1], weights=chosen[3]),
        "logits/chosen": np.average(chosen[2], weights=chosen[3]),
        "logits/rejected": np.average(rejected[2], weights=rejected[3]),
    }


# Microbatches hold different numbers of tokens: a mean of means would be wrong.
@pytest.mark.parametrize(
    ("policy", "microbatches"), [(POLICY, 4), (Plain(POLICY), 1)], ids=["fast", "plain"]
)
def test_a_step_averages_over_tokens(policy, microbatches):
    loss = functools.partial(losses.dpo, beta=0.1)
    options = {"score": WITH_METRICS, "microbatches": microbatches}
    grad = eqx.filter_jit(dpx.make_grad(loss, **options))
    gradients, metrics = grad(policy, BATCH, dpx.snapshot(policy))
    for name, want in expected(POLICY, BATCH).items():
        assert abs(metrics[name] - want) < 1e-12, name
    assert metrics["mean_token_accuracy"] > 0
    plain = eqx.filter_jit(dpx.make_grad(loss, microbatches=microbatches))
    want, without = plain(policy, BATCH, dpx.snapshot(policy))
    assert metrics.keys() - without.keys() == expected(POLICY, BATCH).keys()
    for one, other in zip(*map(jax.tree.leaves, (gradients, want)), strict=True):
        assert np.abs(one - other).max() < 1e-14


@pytest.mark.slow
def test_packed_rows_have_the_same_metrics():
    rows = [
        {
            f"{side}_ids": np.asarray(tokens.ids[row][tokens.mask[row]]).tolist()
            for side, tokens in vars(BATCH).items()
            if isinstance(tokens, dpx.Tokens)
        }
        | {"weight": float(WEIGHT[row])}
        for row in range(BATCH.pairs)
    ]
    packed = data.pack(rows, 32, multiple_of=4, dtype=np.float64)
    score = functools.partial(dpx.score_packed, metrics=NAMES)
    evaluate = eqx.filter_jit(dpx.make_eval(losses.sft, score=score))
    metrics = evaluate(POLICY, packed).mean()
    for name, want in expected(POLICY, BATCH).items():
        assert abs(metrics[name] - want) < 1e-12, name


def test_devices_share_the_tokens():
    mesh = sharding.make_mesh("data=4", devices=jax.devices()[:4])
    evaluate = eqx.filter_jit(dpx.make_eval(losses.sft, score=WITH_METRICS))
    batch = sharding.shard_batch(BATCH, mesh)
    metrics = evaluate(sharding.shard_policy(POLICY, mesh), batch).mean()
    for name, want in expected(POLICY, BATCH).items():
        assert abs(metrics[name] - want) < 1e-12, name


def test_metrics_of_ones_own():
    """They get the values of single tokens: here of the first token of each chosen completion."""

    def first_token(policy, reference, loss):
        del reference
        tokens = policy.chosen_tokens
        return {"first": (tokens.log_probs[:, 0], tokens.mask[:, 0]), "loss": loss.loss}

    score = functools.partial(dpx.score_pairs, metrics=("log_probs",))
    evaluate = eqx.filter_jit(dpx.make_eval(losses.sft, score=score, metrics=first_token))
    first = dpx.Tokens(BATCH.chosen.ids[:, :1], BATCH.chosen.mask[:, :1])
    alone = eqx.tree_at(lambda b: (b.chosen, b.rejected), BATCH, (first, first))
    want = np.average(eqx.filter_jit(dpx.score_pairs)(POLICY, alone).chosen, weights=WEIGHT)
    assert abs(evaluate(POLICY, BATCH).mean()["first"] - want) < 1e-12


def test_single_completions():
    """Each label has its own mean; with token counts as weights it is one over tokens."""
    label = np.arange(BATCH.pairs) % 3 > 0
    weight = WEIGHT * BATCH.chosen.mask.sum(axis=1)
    batch = dpx.UnpairedBatch(BATCH.prompt, BATCH.chosen, label, weight=weight)
    score = functools.partial(dpx.score_unpaired, metrics=NAMES)
    evaluate = eqx.filter_jit(dpx.make_eval(losses.sft, score=score))
    metrics = evaluate(POLICY, batch).mean()
    for side, which in {"chosen": label, "rejected": ~label}.items():
        part = jax.tree.map(lambda x, which=which: x[which], BATCH)
        want = expected(POLICY, part, WEIGHT[which])
        assert abs(metrics[f"logits/{side}"] - want["logits/chosen"]) < 1e-12
        if side == "chosen":
            assert abs(metrics["mean_token_accuracy"] - want["mean_token_accuracy"]) < 1e-12


@pytest.mark.parametrize("metrics", ["entropy", ("entropy", "perplexity")])
def test_unknown_metrics(metrics):
    score = functools.partial(dpx.score_pairs, metrics=metrics)
    with pytest.raises(ValueError, match=r"`metrics` of a score must be some of .*; got"):
        score(POLICY, BATCH)
