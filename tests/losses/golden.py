"""Values, rewards and gradients that Hugging Face TRL itself computed, and the comparison.

`tests/golden/losses.json.gz` says how it was made. Where TRL's conventions are not ours,
`DIFFERENT` says so, and each row of it is asserted: converted by a formula, or shown to differ.
"""

import functools
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import PairLogProbs, losses

from . import cases as table

GOLDEN = json.loads(
    gzip.decompress((pathlib.Path(__file__).parents[1] / "golden" / "losses.json.gz").read_bytes())
)
# TRL's conventions that are not ours, and what the tests do about each.
DIFFERENT = {
    "sigmoid with label smoothing": "TRL ignores it since its refactor; ours, as TRL's before it, "
    "and as the original, is cDPO.",
    "order of aot": "TRL's losses come sorted; ours in the order of the pairs. Both are sorted "
    "here; gradients are compared as they are.",
    "alpha_divergence": "TRL's coefficient is 1 - a of the paper's a. TRL clamps the exponent at "
    "80 without a gradient; ours, in float64, goes on to 300.",
    "delta of bco": "TRL averages over both kinds of completion, and rounds to float32; ours is "
    "any number that the caller carries.",
    "sft": "TRL averages over the tokens of the batch, ours over each completion's: TRL's is the "
    "mean of ours weighted by length.",
    "rewards of cpo's ipo": "TRL's are of averages, ours of sums.",
    "simpo with label smoothing": "`simpo` takes none; TRL's is ours plus eps times the margin.",
    "cpo with label smoothing": "`cpo` takes none; it is `reference_free(dpo)`.",
    "orpo": "TRL hands back beta log sigma of the log-odds ratio, without the likelihood, whose "
    "mean is over the tokens of the batch, the prompt's included.",
    "cpo's likelihood": "TRL averages it over the tokens of the batch, as sft.",
}
CPO = {
    ("sigmoid", 0.0): functools.partial(losses.cpo, alpha=0.0),
    ("sigmoid", 0.1): functools.partial(losses.reference_free(losses.dpo), label_smoothing=0.1),
    ("hinge", 0.0): losses.reference_free(losses.hinge),
    ("ipo", 0.0): losses.reference_free(losses.length_normalized(losses.ipo)),
    ("simpo", 0.0): losses.simpo,
    ("simpo", 0.1): losses.simpo,
}


def cases(part):
    return pytest.mark.parametrize("case", GOLDEN[part], ids=[c["id"] for c in GOLDEN[part]])


def agree(got, want, case, floor=1e-5):
    """To 1e-10 relative, where TRL itself computed in float64.

    Elsewhere `floor` is what is left of differences of float32 numbers of the size of 100.
    """
    rtol, atol = 1e-10, 1e-13
    if case.get("dtype", "float64").startswith("float32"):
        rtol, atol = 2e-5, floor
    elif case.get("loss_type") == "exo_pair":
        rtol, atol = 1e-6, floor / 100  # its epsilon is a float32 tensor
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def gradient(loss, policy, reference, **keywords):
    """The result and the slopes, as NumPy arrays, which mix with counts."""
    return jax.tree.map(np.asarray, table.gradient(loss, policy, reference, **keywords))


def counts(policy):
    return np.asarray(policy.chosen_length), np.asarray(policy.rejected_length)


@functools.cache
def inputs(name):
    x = {key: jnp.asarray(value) for key, value in GOLDEN["inputs"][name].items()}
    lengths = (x["chosen_len"], x["rejected_len"])
    policy = PairLogProbs(x["policy_chosen_logps"], x["policy_rejected_logps"], *lengths)
    return policy, PairLogProbs(x["ref_chosen_logps"], x["ref_rejected_logps"], *lengths)


def halves(rows):
    middle = len(rows) // 2
    return jnp.asarray(rows[:middle]), jnp.asarray(rows[middle:])
