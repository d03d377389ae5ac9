"""XPO in the form of TRL, written with what the policy and what the reference drew."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import losses

from .cases import CASES, close, draw, gradient, records

XPO = next(case for case in CASES if case.name == "xpo")
CHOSEN = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])


def test_it_is_the_form_of_who_drew_what():
    p = draw(XPO)
    is_reference = CHOSEN == 1
    # As in TRL: log-probabilities of the policy's and of the reference's own completions.
    model, of_reference = np.where(is_reference, (p.ll, p.lw), (p.lw, p.ll))
    model_known, reference_known = np.where(is_reference, (p.rl, p.rw), (p.rw, p.rl))
    won = np.where(is_reference, -1, 1)
    logits = won * ((model - model_known) - (of_reference - reference_known))
    want = np.logaddexp(0, -0.3 * logits) + 0.2 * of_reference
    hyper = {"beta": 0.3, "alpha": 0.2, "chosen_is_reference": jnp.asarray(CHOSEN)}
    result, (chosen, rejected) = gradient(losses.xpo, *records(XPO, p), **hyper)
    close(result.loss, want)
    slope = 0.3 / (1 + np.exp(0.3 * logits))
    close(chosen, -slope + 0.2 * CHOSEN)
    close(rejected, slope + 0.2 * (1 - CHOSEN))


def test_without_exploration_it_is_dpo():
    p = records(XPO, draw(XPO))
    close(losses.xpo(*p, alpha=0.0, chosen_is_reference=CHOSEN).loss, losses.dpo(*p).loss)


def test_it_must_be_told_who_drew():
    with pytest.raises(ValueError, match=r'needs `chosen_is_reference`.*per_pair\["chosen_is_ref'):
        losses.xpo(*records(XPO, draw(XPO)))
