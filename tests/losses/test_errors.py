"""Bad input: every message names the argument, the requirement, the value and the remedy."""

import functools
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import PairLogProbs, UnpairedLogProbs, losses

from .cases import CASES, draw, records

PAIR = CASES[0]


NEEDS_REFERENCE = [case for case in CASES if case.reference]
NEEDS_LENGTHS = [case for case in CASES if case.lengths]


@pytest.mark.parametrize("case", NEEDS_REFERENCE, ids=lambda case: case.name)
def test_a_missing_reference(case):
    policy, _ = records(case, draw(case))
    with pytest.raises(ValueError, match=f"`{case.name}` needs a reference.*reference_free"):
        case.loss(policy, None)


@pytest.mark.parametrize("case", [c for c in CASES if not c.reference], ids=lambda c: c.name)
def test_a_reference_that_is_not_needed_is_ignored(case):
    policy, _ = records(case, draw(case))
    _, reference = records(PAIR, draw(PAIR))
    with_one, without = case.loss(policy, reference), case.loss(policy, None)
    np.testing.assert_array_equal(with_one.loss, without.loss)


@pytest.mark.parametrize("case", NEEDS_LENGTHS, ids=lambda case: case.name)
@pytest.mark.parametrize("missing", ["chosen_length", "rejected_length"])
def test_missing_lengths(case, missing):
    policy, reference = records(PAIR, draw(PAIR))
    fields = {name: value for name, value in vars(policy).items() if name != missing}
    message = f"`{case.name}` needs `policy.{missing}`.*score_pairs"
    with pytest.raises(ValueError, match=message):
        case.loss(PairLogProbs(**fields), reference)


def test_missing_lengths_where_a_combinator_needs_them():
    policy, reference = records(PAIR, draw(PAIR))
    bare = PairLogProbs(policy.chosen, policy.rejected)
    with pytest.raises(ValueError, match=r"`length_normalized\(ipo\)` needs `policy.chosen_length"):
        losses.length_normalized(losses.ipo)(bare, reference)
    with pytest.raises(ValueError, match=r"`length_normalized\(ipo\)` needs a reference"):
        losses.length_normalized(losses.ipo)(policy, None)


WITH_BETA = [case for case in CASES if "beta" in case.hyper or case.name == "chi_po"]


@pytest.mark.parametrize("case", WITH_BETA, ids=lambda case: case.name)
@pytest.mark.parametrize("beta", [0, -0.1, float("nan")])
def test_beta_must_be_positive(case, beta):
    with pytest.raises(ValueError, match=f"`beta` must be positive; got {beta}"):
        case.loss(*records(case, draw(case)), beta=beta)


@pytest.mark.parametrize(
    ("loss", "keyword", "value", "message"),
    [
        (losses.dpo, "label_smoothing", 0.5, r"`label_smoothing` must be in \[0, 0.5\); got 0.5"),
        (losses.dpo, "label_smoothing", -0.1, r"must be in \[0, 0.5\); got -0.1"),
        (losses.robust_dpo, "label_smoothing", 0.5, r"must be in \[0, 0.5\); got 0.5"),
        (losses.aot, "label_smoothing", 0.5, r"must be in \[0, 0.5\); got 0.5"),
        (losses.aot_unpaired, "label_smoothing", 1, r"must be in \[0, 0.5\); got 1"),
        (losses.exo, "label_smoothing", 0, r"must be in \(0, 0.5\); got 0"),
        (losses.exo, "label_smoothing", 0.5, r"must be in \(0, 0.5\); got 0.5"),
        (losses.exo, "label_smoothing", float("nan"), r"must be in \(0, 0.5\); got nan"),
        (losses.discopop, "tau", 0, "`tau` must be positive; got 0"),
        (losses.chi_po, "clip", 0.0, "`clip` must be positive; got 0.0"),
        (losses.dpop, "penalty", -1, "`penalty` must not be negative; got -1"),
        (losses.xpo, "alpha", -1.0, "`alpha` must not be negative; got -1.0"),
        (losses.cpo, "alpha", -1.0, "`alpha` must not be negative; got -1.0"),
    ],
)
def test_other_numbers_out_of_range(loss, keyword, value, message):
    with pytest.raises(ValueError, match=message):
        loss(*records(PAIR, draw(PAIR)), **{keyword: value})


@pytest.mark.parametrize("keyword", ["desirable_weight", "undesirable_weight"])
def test_weights_of_kto(keyword):
    case = next(case for case in CASES if case.name == "kto")
    with pytest.raises(ValueError, match=f"`{keyword}` must not be negative; got -1"):
        case.loss(*records(case, draw(case)), **{keyword: -1})


def test_decay_out_of_range():
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\); got 1"):
        losses.update_margin(0.0, 0.1, decay=1)


@pytest.mark.parametrize("missing", ["policy", "reference"])
def test_kto_without_mismatched_completions(missing):
    case = next(case for case in CASES if case.name == "kto")
    given = dict(zip(("policy", "reference"), records(case, draw(case)), strict=True))
    bare = given[missing]
    given[missing] = UnpairedLogProbs(bare.completion, bare.label)
    with pytest.raises(ValueError, match=rf"`kto` needs `{missing}.kl`.*UnpairedBatch\(kl="):
        losses.kto(**given)


def test_labels_that_are_not_boolean():
    # With the type checks of the tests switched on it is they that object, before our own.
    with pytest.raises((ValueError, TypeError), match=r"label"):
        UnpairedLogProbs(jnp.zeros(2), jnp.ones(2, jnp.int32))


@pytest.mark.parametrize("case", [c for c in CASES if not c.divergence], ids=lambda c: c.name)
def test_a_divergence_where_there_is_no_difference(case):
    with pytest.raises(ValueError, match=rf"`divergence`.*; got `{case.name}`"):
        losses.length_normalized(case.loss)
    with pytest.raises(TypeError, match="divergence"):
        case.loss(*records(case, draw(case)), divergence=losses.forward_kl)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sigmod", "Did you mean 'sigmoid'"),
        ("kto_pair", "Did you mean 'kto'|Did you mean 'exo_pair'"),
        ("IPO", "must be one of 'alphapo', 'aot'"),
        ("", "must be one of"),
    ],
)
def test_an_unknown_name(name, hint):
    with pytest.raises(ValueError, match=hint):
        losses.BY_NAME[name]


def test_confidences_missing():
    with pytest.raises(ValueError, match=r"`wpo` needs.*confidence=True"):
        losses.wpo(losses.dpo)(*records(PAIR, draw(PAIR)))


@pytest.mark.parametrize("terms", [(), (losses.dpo,), ((losses.dpo, 1),), ((1, losses.dpo, 2),)])
def test_terms_of_combine(terms):
    # Unwrapped, since the tests' type checks would object first.
    combine = inspect.unwrap(losses.combine)
    with pytest.raises(ValueError, match=r"`combine` takes pairs of a weight and a loss.*; got"):
        combine(*terms)


def test_a_keyword_that_no_term_takes():
    loss = losses.combine((1, functools.partial(losses.dpo, beta=0.1)), (1, losses.sft))
    for keyword in ("beta", "gamma"):
        with pytest.raises(ValueError, match=f"`{keyword}` must be a keyword.*`dpo`, `sft`"):
            loss(*records(PAIR, draw(PAIR)), **{keyword: 0.2})
