"""Losses that couple pairs: their mark, weights in their statistics, rows of weight 0 left out.

How a step carries them over microbatches and devices is tested with the step.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import losses
from dpo_eqx.losses._marks import is_coupled, parts

from .cases import CASES, close, draw, gradient, records

COUPLED = [
    (next(case for case in CASES if case.loss is loss), wrapped)
    for loss, wrapped in [
        (losses.aot, losses.aot),
        (losses.aot_unpaired, losses.aot_unpaired),
        (losses.beta_dpo, losses.beta_dpo),
        (losses.kto, losses.kto),
        (losses.bco, losses.batch_delta(losses.bco)),
        (losses.bco_pair, losses.batch_delta(losses.bco_pair)),
    ]
]
KEPT = np.array([True, False, True, True, False, True, True, True])
WILD = (np.nan, 1e30, np.nan, -np.inf)  # what the log-probabilities of rows of weight 0 may be


table = pytest.mark.parametrize(("case", "loss"), COUPLED, ids=[c.name for c, _ in COUPLED])


def rows(tree, kept):
    return jax.tree.map(lambda x: x[kept], tree)


def hyper(case):
    return {name: value for name, value in case.hyper.items() if name != "delta"}


@table
def test_rows_of_weight_0_have_no_influence(case, loss):
    """Removed, or of weight 0 and full of NaN: the same values and gradients."""
    p = draw(case, pairs=8)
    # Away from 0, so that a row of weight 0 that takes part in a sort is seen to.
    p = p._replace(**{p._fields[0]: p[0] - 20.0})
    wild = [np.where(KEPT, x, filler) for x, filler in zip(p, WILD, strict=False)]
    whole = records(case, type(p)(*wild, *p[len(wild) :]), weight=np.where(KEPT, 1.0, 0.0))
    removed = records(case, type(p)(*(x[KEPT] for x in p)))
    got, want = (gradient(loss, *given, **hyper(case)) for given in (whole, removed))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(x[KEPT], y, 1e-15)


@pytest.mark.parametrize("loss", [losses.aot, losses.aot_unpaired])
def test_transport_gives_rows_of_weight_0_exactly_nothing(loss):
    case = CASES[0]
    weight = np.where(KEPT, 2.0, 0.0)
    result, slopes = gradient(loss, *records(case, draw(case, pairs=8), weight=weight))
    np.testing.assert_array_equal(result.loss[~KEPT], 0)
    for slope in slopes:
        np.testing.assert_array_equal(slope[~KEPT], 0)


@table
def test_all_weights_0_is_finite(case, loss):
    policy, reference = records(case, draw(case), weight=np.zeros(6))
    for leaf in jax.tree.leaves(gradient(loss, policy, reference, **hyper(case))):
        assert np.isfinite(leaf).all()


@table
def test_losses_follow_their_pairs(case, loss):
    """Shuffled rows give shuffled losses: they come in the order of the pairs."""
    policy, reference = records(case, draw(case, pairs=8), weight=np.linspace(0.5, 2, 8))
    order = np.random.default_rng(1).permutation(8)
    result = loss(policy, reference, **hyper(case))
    shuffled = loss(rows(policy, order), rows(reference, order), **hyper(case))
    close(shuffled.loss, np.asarray(result.loss)[order])


@pytest.mark.parametrize(
    ("case", "loss"), [c for c in COUPLED if "aot" not in c[0].name], ids=lambda x: ""
)
def test_a_weight_of_2_is_the_pair_twice(case, loss):
    p = draw(case)
    twice = type(p)(*(np.concatenate([x[:5], x[:1]]) for x in p))
    weighed = loss(*records(case, p, weight=[2.0, 1.0, 1.0, 1.0, 1.0, 0.0]), **hyper(case))
    doubled = loss(*records(case, twice), **hyper(case))
    close(weighed.loss[:5], np.asarray(doubled.loss)[:5])


def test_ties_in_the_sort():
    """Equal margins: whichever is matched to which, the values agree."""
    case = CASES[0]
    p = draw(case)
    p = p._replace(lw=p.ll + 1.0)
    loss, *slopes = (np.sort(x) for x in next(c for c in CASES if c.loss is losses.aot).oracle(p))
    result, got = gradient(losses.aot, *records(case, p))
    close(np.sort(result.loss), loss)
    for mine, want in zip(got, slopes, strict=True):
        close(np.sort(mine), want)


def test_beta_dpo_by_hand():
    policy, reference = records(CASES[0], draw(CASES[0], pairs=3), weight=np.array([1.0, 3.0, 0.0]))
    rho = np.asarray(policy.chosen - reference.chosen - policy.rejected + reference.rejected)
    mean = 0.2 * (rho[0] + 3 * rho[1]) / 4
    want = np.logaddexp(0, -0.2 * (1 + 0.6 * (mean - 0.3)) * rho)
    close(losses.beta_dpo(policy, reference, beta=0.2, margin=0.3).loss, want)


def test_beta_dpo_has_a_floor():
    policy, reference = records(CASES[0], draw(CASES[0]))
    floored = losses.beta_dpo(policy, reference, beta=0.2, margin=100.0)
    close(floored.loss, losses.dpo(policy, reference, beta=1e-3).loss)


def test_no_gradient_through_the_statistics():
    """The slope of one row's loss with respect to another row is 0, but for the sorted."""
    for case, loss in COUPLED:
        if case.loss in (losses.aot, losses.aot_unpaired):
            continue
        policy, reference = records(case, draw(case))
        name = "completion" if case.unpaired else "chosen"

        def losses_of(x, policy=policy, reference=reference, name=name, loss=loss):
            return loss(replace(policy, **{name: x}), reference).loss

        slopes = np.asarray(jax.jacobian(losses_of)(getattr(policy, name)))
        np.testing.assert_array_equal(slopes, np.diag(np.diag(slopes)))


def test_no_gradient_through_the_point_of_kto():
    case = next(case for case in CASES if case.name == "kto")
    policy, reference = records(case, draw(case))
    slope = jax.grad(lambda x: losses.kto(replace(policy, kl=x), reference).loss.sum())(policy.kl)
    np.testing.assert_array_equal(slope, 0)


@table
def test_the_mark_is_seen_through_partial_and_combinators(case, loss):
    assert is_coupled(loss)
    assert is_coupled(partial(partial(loss, beta=0.1), margin=0.0))
    assert is_coupled(losses.reference_free(partial(loss, beta=0.1)))
    assert is_coupled(losses.combine((1, losses.dpo), (0.5, losses.wpo(loss))))


def test_losses_that_do_not_couple_bear_no_mark():
    marked = {losses.aot, losses.aot_unpaired, losses.beta_dpo, losses.kto}
    for case in CASES:
        assert is_coupled(case.loss) == (case.loss in marked)
    for loss in (losses.BY_NAME["ipo"], losses.wpo(losses.dpo), losses.reference_free(losses.dpo)):
        assert not is_coupled(loss)


def test_bound_arrays_are_seen_through_combinators():
    beta = jnp.ones(3)
    loss = losses.combine(
        (1, losses.length_normalized(partial(losses.dpo, beta=beta))), (1, losses.sft)
    )
    bound = [keywords for _, keywords in parts(loss) if keywords]
    assert len(bound) == 1
    assert bound[0]["beta"] is beta


def test_a_users_own_coupled_loss():
    @losses.couples_pairs
    def centred(policy, reference, *, beta=0.1):
        result = losses.dpo(policy, reference, beta=beta)
        return replace(result, loss=result.loss - result.loss.mean())

    assert is_coupled(losses.combine((1, centred)))
    policy, reference = records(CASES[0], draw(CASES[0]))
    close(losses.combine((1, centred))(policy, reference).loss.sum(), 0)


def test_the_mark_leaves_what_it_marks_alone():
    """It can be put on one of our losses, on a `partial`, on a bound method."""

    class Holder:
        def loss(self, policy, reference):
            return losses.dpo(policy, reference)

    policy, reference = records(CASES[0], draw(CASES[0]))
    for loss in (losses.dpo, partial(losses.dpo, label_smoothing=0.0), Holder().loss):
        marked = losses.couples_pairs(loss)
        assert is_coupled(marked)
        assert is_coupled(losses.wpo(partial(marked)))
        assert not is_coupled(loss)
        close(marked(policy, reference).loss, losses.dpo(policy, reference).loss)
    beta = jnp.ones(6)
    bound = [
        keywords for _, keywords in parts(losses.couples_pairs(partial(losses.dpo, beta=beta)))
    ]
    assert bound[-1]["beta"] is beta
