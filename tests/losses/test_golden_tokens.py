"""Losses from tokens, from logits and without a reference, against TRL's: see `golden.py`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import PairLogProbs, losses, token_log_probs

from . import cases as table
from .golden import CPO, GOLDEN, agree, cases, counts, gradient, halves, inputs


@functools.cache
def tokens():
    """Rows of token log-probabilities, the chosen in the first half, and their masks."""
    x = GOLDEN["token_inputs"]
    mask = np.array(x["completion_mask"], bool)[:, 1:]
    policy, reference = (np.where(mask, x[k], 0) for k in ("policy_token_logps", "ref_token_logps"))
    confidence = policy - np.where(mask, x["log_sum_sq_probs"], 0)
    return policy, reference, mask, np.exp(confidence.sum(1) / mask.sum(1))


def from_tokens():
    policy, reference, mask, confidence = tokens()
    lengths = halves(mask.sum(1))
    confidences = dict(
        zip(("chosen_confidence", "rejected_confidence"), halves(confidence), strict=True)
    )
    return (
        PairLogProbs(*halves(policy.sum(1)), *lengths, **confidences),
        PairLogProbs(*halves(reference.sum(1)), *lengths),
    )


def per_token(mean, policy, reference):
    """The gradient of a mean loss with respect to each token's log-probability."""
    floats, rest = table.split(policy)
    slopes = jax.grad(lambda x: mean(table.join(x, rest), reference))(floats)
    return np.concatenate(slopes)[:, None] * tokens()[2]


@pytest.mark.parametrize(
    "case",
    [case for case in GOLDEN["dpo_token"] if "ld_alpha" not in case],  # see `test_ld_score.py`
    ids=lambda case: case["id"],
)
def test_weightings_and_sums_of_losses(case):
    policy, reference = from_tokens()
    smoothing = {"robust": {"label_smoothing": 0.0}}  # TRL's default where no case says otherwise
    named = [
        functools.partial(losses.BY_NAME[name], **smoothing.get(name, {}))
        for name in case["loss_types"]
    ]
    if "wpo" in case:
        named = [losses.wpo(loss) for loss in named]
        agree(tokens()[3], case["wpo_weights"], case)
    weights = case.get("weights", [1.0] * len(named))
    if "rpo" in case["id"]:
        weights = [1.0, 1.0]

    def mean(policy, reference):
        """As TRL's: `sft` averaged over all tokens, see `DIFFERENT`."""
        total, tokens = 0.0, policy.chosen_length.astype(float)
        for name, weight, loss in zip(case["loss_types"], weights, named, strict=True):
            beta = {} if name == "sft" else {"beta": case["beta"]}
            own = loss(policy, reference, **beta).loss
            total += weight * ((own * tokens).sum() / tokens.sum() if name == "sft" else own.mean())
        return total

    agree(mean(policy, reference), case["loss_mean"], case)
    if case["loss_types"] != ["sft"] and len(named) == 1:
        agree(named[0](policy, reference, beta=case["beta"]).loss, case["losses"], case)
    if case["grad_policy_token_logps"] is not None:
        got = per_token(mean, policy, reference)
        agree(got, np.where(tokens()[2], case["grad_policy_token_logps"], 0), case)


@cases("cpo")
def test_losses_without_a_reference(case):
    policy, _ = inputs(case["inputs"])
    extra = {}
    loss = CPO[case["loss_type"], case["label_smoothing"]]
    if case["loss_type"] == "simpo":
        extra["gamma"] = case["simpo_gamma"]
    if case["alpha"]:
        loss, extra["alpha"] = losses.alpha_po, case["alpha"]

    def loss_as_trl(policy, reference):
        """With label smoothing, by -log sigma(-z) = -log sigma(z) + z: see `DIFFERENT`."""
        result = loss(policy, reference, beta=case["beta"], **extra)
        if case["loss_type"] == "simpo":
            margin = result.chosen_reward - result.rejected_reward - case["simpo_gamma"]
            smoothed = result.loss + case["label_smoothing"] * margin
            result = dataclasses.replace(result, loss=smoothed)
        return result

    result, slopes = gradient(loss_as_trl, policy, None)
    agree(result.loss, case["losses"], case)
    fed = counts(policy) if case["length_averaged"] else (1, 1)
    agree(slopes[0] * fed[0] / 8, case["grad_fed_chosen_logps"], case, floor=1e-6)
    agree(slopes[1] * fed[1] / 8, case["grad_fed_rejected_logps"], case, floor=1e-6)
    shrink = counts(policy) if case["loss_type"] == "ipo" else (1, 1)
    agree(result.chosen_reward / shrink[0], case["chosen_rewards"], case)
    agree(result.rejected_reward / shrink[1], case["rejected_rewards"], case)


@cases("orpo")
def test_odds_ratio(case):
    policy, _ = inputs(case["inputs"])
    result, slopes = gradient(losses.orpo, policy, None, beta=case["beta"])
    chosen, rejected = counts(policy)
    ratio = -(result.loss + np.asarray(policy.chosen) / chosen)
    agree(ratio, case["losses_sign_as_trl"], case)
    agree((slopes[0] * chosen + 1) / 8, case["grad_or_term_chosen"], case, floor=1e-6)
    agree(slopes[1] * rejected / 8, case["grad_or_term_rejected"], case, floor=1e-6)
    agree(result.chosen_reward, case["chosen_rewards"], case)
    agree(result.rejected_reward, case["rejected_rewards"], case)


def scored(logits, name, mask_name="completion_mask"):
    """Log-probabilities of tokens where the mask is true, and the counts."""
    x = GOLDEN["logits_inputs"][name]
    ids, mask = np.array(x["input_ids"]), np.array(x[mask_name], bool)[:, 1:]
    log_probs = jnp.where(mask, token_log_probs(logits[:, :-1], ids[:, 1:]), 0)
    return log_probs, mask.sum(1)


@cases("full_from_logits")
def test_whole_losses_from_logits(case):
    name = case["logits_inputs"]
    logits = jnp.asarray(GOLDEN["logits_inputs"][name]["logits"])
    orpo = "loss_type" not in case

    def mean(logits):
        log_probs, lengths = scored(logits, name)
        policy = PairLogProbs(*halves(log_probs.sum(1)), *halves(lengths))
        if orpo:
            log_probs, lengths = scored(logits, name, "attention_mask")
            own = losses.orpo(policy, None, beta=case["beta"]).loss
            own -= losses.sft(policy, None).loss
        else:
            extra = {"gamma": case["simpo_gamma"]} if case["loss_type"] == "simpo" else {}
            own = CPO[case["loss_type"], 0.0](policy, None, beta=case["beta"], **extra).loss
        # TRL's likelihood term: a mean over tokens, see `DIFFERENT`.
        likelihood = halves(log_probs)[0].sum() / float(np.split(lengths, 2)[0].sum())
        return own.mean() - case.get("cpo_alpha", 1.0) * likelihood

    loss, slope = jax.value_and_grad(mean)(logits)
    tolerance = {"dtype": "float32"} if orpo else {}
    agree(loss, case["loss"], tolerance)
    agree(slope, case["grad_logits"], tolerance)
