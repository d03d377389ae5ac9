"""Per-pair diagnostics, and preferences counted over batches: against loops in float64."""

import dataclasses
import operator
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses

from .policies import Perceptron, assert_close, random_batch

POLICY, REFERENCE = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))
BATCH = random_batch()
LOSS = partial(losses.dpo, beta=0.3)
examine = eqx.filter_jit(dpx.make_diagnose(LOSS))


def log_probs(seed=0, pairs=8):
    """Log-probabilities of policy and reference, and weights with a zero among them."""
    rng = np.random.default_rng(seed)
    ours, theirs = (
        dpx.PairLogProbs(rng.normal(-9, 3, pairs), rng.normal(-9, 3, pairs)) for _ in range(2)
    )
    return ours, theirs, np.where(np.arange(pairs) == 2, 0, rng.uniform(0.5, 2, pairs))


def test_the_weights_of_dpo_are_those_of_its_paper():
    ours, theirs, _ = log_probs()
    got = dpx.diagnose(LOSS, ours, theirs)
    chosen, rejected = ours.chosen - theirs.chosen, ours.rejected - theirs.rejected
    z = 0.3 * (chosen - rejected)
    np.testing.assert_allclose(got.margin, z, rtol=1e-12)
    np.testing.assert_allclose(got.chosen_log_ratio, chosen, rtol=1e-12)
    np.testing.assert_allclose(got.rejected_log_ratio, rejected, rtol=1e-12)
    np.testing.assert_allclose(got.chosen_reward - got.rejected_reward, z, rtol=1e-12)
    for weight in (got.chosen_gradient_weight, got.rejected_gradient_weight):
        np.testing.assert_allclose(weight, 0.3 / (1 + np.exp(z)), rtol=1e-12)


@pytest.mark.parametrize("name", ["sft", "sppo_hard", "simpo"])
def test_the_weights_of_any_loss_are_its_slopes(name):
    ours, theirs, _ = log_probs()
    ours = dataclasses.replace(ours, chosen_length=np.full(8, 3), rejected_length=np.full(8, 5))
    loss, step = losses.BY_NAME[name], 1e-6
    got = dpx.diagnose(loss, ours, theirs)
    for side, sign in (("chosen", -1), ("rejected", 1)):
        moved = [
            loss(dataclasses.replace(ours, **{side: getattr(ours, side) + s * step}), theirs).loss
            for s in (1, -1)
        ]
        slope = sign * (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(getattr(got, f"{side}_gradient_weight"), slope, atol=1e-7)


def test_without_a_reference_there_is_no_ratio():
    ours, _, _ = log_probs()
    got = dpx.diagnose(losses.reference_free(LOSS), ours)
    assert got.chosen_log_ratio is None
    np.testing.assert_allclose(got.margin, 0.3 * (ours.chosen - ours.rejected), rtol=1e-12)
    with pytest.raises(ValueError, match="`dpo` needs a reference and got none"):
        dpx.diagnose(LOSS, ours)


def test_a_batch_gives_what_evaluation_averages():
    got = examine(POLICY, BATCH, REFERENCE)
    want = eqx.filter_jit(dpx.make_eval(LOSS))(POLICY, BATCH, REFERENCE).mean()
    for name, values in {
        "loss": got.loss,
        "rewards/margins": got.margin,
        "logps/chosen": got.policy.chosen,
    }.items():
        np.testing.assert_allclose(np.average(values, weights=BATCH.weight), want[name])
    given = dataclasses.replace(BATCH, reference=got.reference)
    assert_close(examine(POLICY, given).margin, got.margin, 1e-12)


def test_arguments_of_the_loss_for_each_pair_are_applied():
    beta = np.linspace(0.1, 0.8, 8)
    batch = dataclasses.replace(BATCH, per_pair={"beta": beta})
    got = eqx.filter_jit(dpx.make_diagnose(losses.dpo))(POLICY, batch, REFERENCE)
    plain = examine(POLICY, BATCH, REFERENCE)
    np.testing.assert_allclose(got.margin, plain.margin * beta / 0.3, rtol=1e-10)


def by_hand(policy, margin, kl, weight, bins):
    """The quantities of `Preferences.mean`, by loops over pairs in float64."""

    def half(x):
        return 1.0 if x > 0 else 0.0 if x < 0 else 0.5

    total = sum(weight)
    rows = [[0.0, 0.0, 0.0, 0] for _ in range(bins)]
    means = dict.fromkeys(["preference_accuracy", "win_rate", "reward_margin_mean", "kl"], 0.0)
    for c, r, m, k, w in zip(policy.chosen, policy.rejected, margin, kl, weight, strict=True):
        if w == 0:
            continue
        means["preference_accuracy"] += w * half(c - r) / total
        means["win_rate"] += w * half(m) / total
        means["reward_margin_mean"] += w * m / total
        means["kl"] += w * sum(k) / 2 / total
        sure = 1 / (1 + np.exp(-abs(m)))
        place = min(int((sure - 0.5) / 0.5 * bins), bins - 1)
        for i, value in enumerate((w * sure, w * half(m), w, 1)):
            rows[place][i] += value
    squares = [
        w * (m - means["reward_margin_mean"]) ** 2
        for m, w in zip(margin, weight, strict=True)
        if w > 0
    ]
    return means | {"reward_margin_std": (sum(squares) / total) ** 0.5}, rows


def ragged(pairs=37, seed=3):
    policy, _, weight = log_probs(seed, pairs)
    rng = np.random.default_rng(seed)
    margin = rng.normal(1000, 2, pairs) - 999.5  # a sum of squares would cancel
    margin[5], margin[2] = 0.0, np.nan  # a tie; and pair 2 has weight 0
    kl = rng.uniform(0, 3, (2, pairs))
    return policy, margin, kl, weight


@partial(jax.jit, static_argnames="axis_name")
def count(policy, margin, kl, weight, **options):
    return dpx.count_preferences(policy, margin, tuple(kl), weight=weight, **options)


def check_counted(counted, wanted, tolerance=1e-12):
    means, rows = wanted
    got = counted.mean()
    assert got.keys() == means.keys()
    for name, value in means.items():
        np.testing.assert_allclose(got[name], value, rtol=tolerance, err_msg=name)
    c = counted.calibration
    got = np.stack([c.predicted, c.came_true, c.weight, c.count.astype(float)], axis=1)
    np.testing.assert_allclose(got, rows, rtol=tolerance, atol=1e-13)


def test_preferences_equal_loops():
    data = ragged()
    means, rows = by_hand(data[0], data[1], data[2].T, data[3], 10)
    check_counted(count(*data), (means, rows))
    assert 0 < means["preference_accuracy"] < means["win_rate"] < 1
    assert sum(row[3] for row in rows) == 36


@pytest.mark.parametrize("sizes", [(5, 0, 31, 1), (1, 2, 34)])
def test_ragged_batches_join_exactly(sizes):
    data = ragged()
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    @jax.jit
    def joined(policy, margin, kl, weight):
        rows = policy, margin, kl.T, weight
        each = [jax.tree.map(operator.itemgetter(part), rows) for part in parts]
        return sum(count(policy, margin, kl.T, weight) for policy, margin, kl, weight in each)

    want = by_hand(data[0], data[1], data[2].T, data[3], 10)
    check_counted(joined(*data), want)


def test_over_devices_as_on_one():
    policy, margin, kl, weight = ragged(40)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        partial(count, axis_name="data"),
        mesh=mesh,
        in_specs=(P("data"), P("data"), P(None, "data"), P("data")),
        out_specs=P(),
    )
    got = jax.jit(mapped)(policy, margin, kl, weight)
    check_counted(got, by_hand(policy, margin, kl.T, weight, 10))


def test_means_without_a_cancelling_sum_of_squares():
    """In float32, batch after batch: margins near 1000 whose spread is 1e-2."""
    rng = np.random.default_rng(0)
    margins = (1000 + 0.01 * rng.normal(size=4096)).astype(np.float32)
    zeros = np.zeros(64, np.float32)
    policy = dpx.PairLogProbs(zeros, zeros)
    run = jax.jit(lambda margin: dpx.count_preferences(policy, margin))
    means = sum(run(part) for part in np.split(margins, 64)).mean()
    np.testing.assert_allclose(means["reward_margin_std"], margins.std(dtype=float), rtol=1e-3)
    assert "kl" not in means


def test_nothing_counted_is_zero():
    policy, margin, kl, _ = ragged()
    counted = count(policy, margin, kl, np.zeros(37))
    assert all(value == 0 for value in counted.mean().values())
    predicted, frequency = counted.calibration.mean()
    assert not predicted.any()
    assert not frequency.any()


def test_the_log_odds_of_a_bradley_terry_model_are_calibrated():
    """Labels drawn with exactly the probability that the margin says: each bin within 4 sigma."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(0, 1.5, (40_000, 2))
    log_odds = rewards[:, 0] - rewards[:, 1]
    first_is_chosen = rng.uniform(size=40_000) < 1 / (1 + np.exp(-log_odds))
    margin = np.where(first_is_chosen, log_odds, -log_odds)

    def deviations(margin):
        c = dpx.calibrate(margin)
        predicted, frequency = map(np.asarray, c.mean())
        error = np.sqrt(predicted * (1 - predicted) / np.asarray(c.count))
        return (frequency - predicted) / error

    assert dpx.calibrate(margin).count.min() > 1000
    assert np.abs(deviations(margin)).max() < 4
    # A policy twice as sure as it should be is found out, and so is one half as sure.
    assert deviations(2 * margin).min() < -10
    assert deviations(margin / 2).max() > 10


def test_bins(unchecked):
    c = dpx.calibrate(np.array([0.0, 0.1, -0.1, 50.0]), bins=2)
    assert c.count.tolist() == [3, 1]
    np.testing.assert_allclose(c.mean()[1], [0.5, 1])
    with pytest.raises(ValueError, match="`bins` must be a positive number of bins; got 0"):
        dpx.calibrate(jnp.zeros(1), bins=0)
