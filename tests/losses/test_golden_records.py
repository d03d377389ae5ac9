"""Losses of pairs, and of single completions, against TRL's own values: see `golden.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import UnpairedLogProbs, losses

from .golden import GOLDEN, agree, cases, gradient, inputs

DIVERGENCE = {
    "reverse_kl": lambda coefficient: losses.reverse_kl,
    "forward_kl": lambda coefficient: losses.forward_kl,
    "js_divergence": lambda coefficient: losses.jensen_shannon,
    "alpha_divergence": lambda coefficient: losses.alpha_divergence(1.0 - coefficient),
}
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


def keywords(case):
    own = {"beta": case["beta"]}
    if case["loss_type"] in SMOOTHED:
        own["label_smoothing"] = case["label_smoothing"]
    if "tau" in case["id"]:
        own["tau"] = float(case["id"].rpartition("tau")[2])
    if case["f_divergence_type"] != "reverse_kl":
        divergence = DIVERGENCE[case["f_divergence_type"]]
        own["divergence"] = divergence(case["f_alpha_divergence_coef"])
    return own


def kind(case):
    """What cases share that are computed at once: all but the inputs and `beta`."""
    parts = case["id"].split("|")
    return "|".join(parts[:1] + parts[2:4] + parts[5:]) + f"|{case['dtype']}"


def grouped(part):
    """The cases of one kind, with the pairs in one row; those that couple pairs each alone.

    Of each kind eight, some of them twice, so that nothing is compiled for another shape.
    """
    groups = {}
    for case in part:
        alone = f"|{case['id']}" if case["loss_type"].startswith("aot") else ""
        groups.setdefault(kind(case) + alone, []).append(case)
    rows = [
        g if len(g) == 1 else [g[i % len(g)] for i in range(max(8, len(g)))]
        for g in groups.values()
    ]
    return pytest.mark.parametrize("group", rows, ids=groups.keys())


@grouped(GOLDEN["dpo"])
def test_losses_of_pairs(group):
    """All cases of a kind at once, `beta` being one value per pair."""
    case = group[0]
    records = zip(*(inputs(c["inputs"]) for c in group), strict=True)
    policy, reference = (jax.tree.map(lambda *x: jnp.concatenate(x), *r) for r in records)
    beta = jnp.repeat(jnp.asarray([c["beta"] for c in group]), 8)
    loss = losses.BY_NAME[case["loss_type"]]
    result, slopes = gradient(loss, policy, reference, **keywords(case) | {"beta": beta})
    got, want = result.loss, np.concatenate([c["losses"] for c in group])
    if case["loss_type"].startswith("aot"):
        got, want = np.sort(got), np.sort(want)
    agree(got, want, case)
    for name, got, floor in (
        ("grad_policy_chosen_logps", slopes[0] / 8, 1e-6),
        ("grad_policy_rejected_logps", slopes[1] / 8, 1e-6),
        ("chosen_rewards", result.chosen_reward, 1e-5),
        ("rejected_rewards", result.rejected_reward, 1e-5),
    ):
        agree(got, np.concatenate([c[name] for c in group]), case, floor)


@pytest.mark.parametrize(
    "case",
    [c for c in GOLDEN["dpo"] if c["loss_type"] == "sigmoid" and c["label_smoothing"]],
    ids=lambda case: case["id"],
)
def test_label_smoothing_of_sigmoid_is_not_ignored(case):
    policy, reference = inputs(case["inputs"])
    ours = losses.dpo(policy, reference, beta=case["beta"], label_smoothing=0.1)
    assert np.abs(np.asarray(ours.loss) - case["losses"]).max() > 1e-3


@cases("kto")
def test_losses_of_single_completions(case):
    policy, reference = inputs("normal")
    labels = jnp.asarray(case["labels"])
    policy = UnpairedLogProbs(policy.chosen, labels, kl=jnp.asarray(case["KL_policy_logps"]))
    reference = UnpairedLogProbs(reference.chosen, labels, kl=jnp.asarray(case["KL_ref_logps"]))
    weights = {}
    if case["loss_type"] == "kto":
        weights = {k: case[k] for k in ("desirable_weight", "undesirable_weight")}
    loss = losses.BY_NAME[case["loss_type"]]
    result, (slope,) = gradient(loss, policy, reference, beta=case["beta"], **weights)
    order = np.array(case["chosen_idx"] + case["rejected_idx"], int)
    scale = np.ones(8)
    if case["loss_type"] != "kto":
        # TRL weighs this one too; ours leaves that to `weight`.
        scale = np.where(labels, case["desirable_weight"], case["undesirable_weight"])
    agree((result.loss * scale)[order], case["losses_chosen_then_rejected"], case)
    agree(slope * scale / 8, case["grad_policy_logps"], case, floor=1e-6)
    agree(result.reward[order], case["chosen_rewards"] + case["rejected_rewards"], case)


LEGACY = {
    "sigmoid": losses.dpo,
    "ipo": losses.ipo,
    "bco_pair": losses.bco_pair,
}


@pytest.mark.parametrize(
    "case", [c for c in GOLDEN["legacy"] if "steps" not in c], ids=lambda case: case["id"]
)
def test_losses_of_older_versions(case):
    policy, reference = inputs(case["inputs"])
    loss, extra = LEGACY[case["loss_type"]], {}
    if case["loss_type"] == "sigmoid":
        extra["label_smoothing"] = case["label_smoothing"]
    if "delta" in case:
        extra["delta"] = case["delta"]
    free = "reference_free" in case["id"]
    if free:
        loss = losses.reference_free(loss)
    result, slopes = gradient(loss, policy, reference, beta=case["beta"], **extra)
    agree(result.loss, case["losses"], case)
    agree(slopes[0] / 8, case["grad_policy_chosen_logps"], case, floor=1e-6)
    agree(slopes[1] / 8, case["grad_policy_rejected_logps"], case, floor=1e-6)
    if not free:  # TRL's rewards were those of the reference all the same
        agree(result.chosen_reward, case["chosen_rewards"], case)


@pytest.mark.parametrize(
    "case", [c for c in GOLDEN["legacy"] if "steps" in c], ids=lambda case: case["id"]
)
def test_bco_with_its_running_shift(case):
    delta = 0.0
    for count, (name, step) in enumerate(zip(case["inputs"], case["steps"], strict=True), 1):
        pairs = inputs(name)
        label = jnp.arange(16) < 8
        policy, reference = (
            UnpairedLogProbs(jnp.concatenate([x.chosen, x.rejected]), label) for x in pairs
        )
        rewards = losses.bco(policy, reference, beta=case["beta"]).reward
        delta = losses.update_delta(delta, rewards.mean(), count=count)
        np.testing.assert_allclose(delta, step["delta"], rtol=1e-7)  # TRL's is float32
        hyper = {"beta": case["beta"], "delta": step["delta"]}
        result, (slope,) = gradient(losses.bco, policy, reference, **hyper)
        agree(result.loss, step["losses_chosen_then_rejected"], case)
        agree(slope[:8] / 16, step["grad_policy_chosen_logps"], case, floor=1e-6)
        agree(slope[8:] / 16, step["grad_policy_rejected_logps"], case, floor=1e-6)
