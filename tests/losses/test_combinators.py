"""`combine`, `length_normalized`, `reference_free`, `wpo` and the names."""

import inspect
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import PairLogProbs, losses

from .cases import CASES, DIVERGENCES, close, draw, gradient, records

PAIR = CASES[0]
OF_DIFFERENCE = [case for case in CASES if case.divergence]


@pytest.fixture
def both():
    return records(PAIR, draw(PAIR))


def test_combine_is_the_weighted_sum_with_the_first_rewards(both):
    parts = losses.ipo(*both, beta=0.2), losses.sft(*both), losses.simpo(*both)
    loss = losses.combine(
        (0.5, partial(losses.ipo, beta=0.2)), (2, losses.sft), (jnp.asarray(0.1), losses.simpo)
    )
    result = loss(*both)
    close(result.loss, 0.5 * parts[0].loss + 2 * parts[1].loss + 0.1 * parts[2].loss)
    np.testing.assert_array_equal(result.chosen_reward, parts[0].chosen_reward)
    np.testing.assert_array_equal(result.rejected_reward, parts[0].rejected_reward)


def test_combine_sends_a_keyword_to_whoever_takes_and_has_not_bound_it(both):
    beta = jnp.linspace(0.1, 0.4, 6)
    inner = losses.combine((1, losses.hinge))
    loss = losses.combine(
        (1, losses.dpo), (1, losses.sft), (1, partial(losses.ipo, beta=0.5)), (1, inner)
    )
    want = losses.dpo(*both, beta=beta).loss + losses.sft(*both).loss
    want += losses.ipo(*both, beta=0.5).loss + losses.hinge(*both, beta=beta).loss
    close(loss(*both, beta=beta).loss, want)


def test_combine_sends_a_keyword_past_a_term_that_has_bound_it(both):
    """One term of the inner sum has bound `beta`, the other takes it."""
    inner = losses.combine((1, partial(losses.dpo, beta=0.5)), (1, losses.ipo))
    got = losses.combine((1, inner), (1, losses.hinge))(*both, beta=0.2)
    want = losses.dpo(*both, beta=0.5).loss + losses.ipo(*both, beta=0.2).loss
    close(got.loss, want + losses.hinge(*both, beta=0.2).loss)


def test_weights_of_combine_can_be_differentiated(both):
    slope = jax.grad(lambda w: losses.combine((1, losses.dpo), (w, losses.sft))(*both).loss.sum())
    close(slope(0.3), losses.sft(*both).loss.sum())


def test_combine_takes_unpaired_losses():
    case = next(case for case in CASES if case.name == "kto")
    both = records(case, draw(case))
    result = losses.combine((1, losses.kto), (2, losses.bco))(*both)
    close(result.loss, losses.kto(*both).loss + 2 * losses.bco(*both).loss)


@pytest.mark.parametrize("case", OF_DIFFERENCE, ids=lambda case: case.name)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("way", ["passed", "bound"])
def test_length_normalized_divides_scores(case, name, way):
    """s(rho) / n, not s(rho / n); rewards stay those of the sums."""
    p, divergence = draw(case), DIVERGENCES[name]
    w, l = (np.asarray(divergence(jnp.asarray(rho))) for rho in p.rhos)  # noqa: E741
    averaged = p._replace(lw=w / p.nw, ll=l / p.nl, rw=0 * w, rl=0 * l)
    if way == "bound":
        loss = losses.length_normalized(partial(case.loss, divergence=divergence))
        result = loss(*records(case, p), **case.hyper)
    else:
        loss = losses.length_normalized(case.loss)
        result = loss(*records(case, p), divergence=divergence, **case.hyper)
    close(result.loss, case.oracle(averaged, **case.hyper)[0])
    close((result.chosen_reward, result.rejected_reward), case.reward(p, case.hyper["beta"]))


def test_length_normalized_takes_a_users_own_loss(both):
    def squared(policy, reference, *, divergence=losses.reverse_kl):
        rho = divergence(policy.chosen - reference.chosen)
        return losses.PairLoss(rho**2, rho, rho)

    p = draw(PAIR)
    close(losses.length_normalized(squared)(*both).loss, (p.rhos[0] / p.nw) ** 2)


def test_an_empty_completion_counts_as_one_token():
    zeros, lengths = jnp.zeros(1), jnp.zeros(1, jnp.int32)
    empty = PairLogProbs(zeros - 2.0, zeros, lengths, lengths)
    close(losses.length_normalized(losses.dpo)(empty, empty).loss, np.log(2))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_free_is_a_reference_of_0(case):
    p = draw(case)
    zero = {k: 0 * getattr(p, k) for k in (("r", "rkl") if case.unpaired else ("rw", "rl"))}
    policy, _ = records(case, p)
    result = losses.reference_free(case.loss)(policy, None, **case.hyper)
    close(result.loss, case.oracle(p._replace(**zero), **case.hyper)[0])
    close(
        jax.tree.leaves(result)[1],
        np.atleast_2d(case.reward(p._replace(**zero), case.hyper.get("beta")))[0],
    )


@pytest.mark.parametrize("given", [True, False], ids=["given", "absent"])
def test_reference_free_around_and_inside_length_normalized(both, given):
    """Either way a reference that is given has no influence."""
    policy, reference = both if given else (both[0], None)
    want = losses.simpo(policy, None, gamma=0.0, beta=2.0)
    free = losses.reference_free(partial(losses.dpo, beta=2.0))
    for loss in (
        losses.reference_free(losses.length_normalized(partial(losses.dpo, beta=2.0))),
        losses.length_normalized(free),
        losses.length_normalized(partial(free, label_smoothing=0.0)),
    ):
        result = loss(policy, reference)
        close(result.loss, want.loss)
        close(result.chosen_reward, 2.0 * policy.chosen)


def test_wpo_weighs_by_the_detached_product_of_confidences(both):
    chosen, rejected = jnp.linspace(0.1, 1.2, 6), jnp.linspace(0.9, 0.2, 6)
    policy = replace(both[0], chosen_confidence=chosen, rejected_confidence=rejected)
    result, slopes = gradient(losses.wpo(losses.dpo), policy, both[1], beta=0.3)
    plain, plain_slopes = gradient(losses.dpo, policy, both[1], beta=0.3)
    close(result.loss, plain.loss * chosen * rejected)
    np.testing.assert_array_equal(result.chosen_reward, plain.chosen_reward)
    for got, want in zip(slopes, plain_slopes, strict=True):
        close(got, want * chosen * rejected)

    def of_confidence(confidence):
        weighed = replace(policy, chosen_confidence=confidence)
        return losses.wpo(losses.dpo)(weighed, both[1]).loss.sum()

    np.testing.assert_array_equal(jax.grad(of_confidence)(chosen), 0)


def test_wpo_of_length_normalized(both):
    policy = replace(both[0], chosen_confidence=jnp.full(6, 0.5), rejected_confidence=jnp.ones(6))
    inner = losses.length_normalized(losses.dpo)
    want = 0.5 * inner(*both).loss
    close(losses.wpo(inner)(policy, both[1]).loss, want)
    close(losses.length_normalized(losses.wpo(losses.dpo))(policy, both[1]).loss, want)


def test_combinators_show_the_keywords_of_their_loss():
    for combinator in (losses.length_normalized, losses.reference_free, losses.wpo):
        parameters = inspect.signature(combinator(losses.dpo)).parameters
        assert list(parameters) == list(inspect.signature(losses.dpo).parameters)


def test_names():
    field = "sigmoid robust hinge ipo sigmoid_norm exo_pair nca_pair bco_pair sppo_hard aot "
    field += "aot_unpaired aot_pair apo_zero apo_down discopop sft simpo cpo orpo alphapo kto bco "
    field += "apo_zero_unpaired"
    assert set(field.split()) <= set(losses.BY_NAME)
    # A name chooses a loss of log-probabilities alone; `bradley_terry` takes rewards, and `xpo`
    # needs to know who drew each completion.
    without = {losses.ipo, losses.bradley_terry, losses.xpo}
    assert {case.loss for case in CASES} <= set(losses.BY_NAME.values()) | without


def test_the_names_ipo_and_sigmoid_norm_are_of_averages(both):
    p = draw(PAIR)
    margin = p.rhos[0] / p.nw - p.rhos[1] / p.nl
    close(losses.BY_NAME["ipo"](*both, beta=0.2).loss, (margin - 2.5) ** 2)
    close(losses.BY_NAME["sigmoid_norm"](*both, beta=0.2).loss, np.logaddexp(0, -0.2 * margin))
