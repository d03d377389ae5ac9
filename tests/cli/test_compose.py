"""Losses, optimisers and schedules from settings, against what they are made of."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import losses
from dpo_eqx._arrays.batches import PreferenceBatch
from dpo_eqx._arrays.log_probs import PairLogProbs
from dpo_eqx._arrays.tokens import Tokens
from dpo_eqx._scoring.score import ld_score, score_pairs
from dpo_eqx.cli.commands.train import total_steps
from dpo_eqx.cli.compose.loss import compose_loss, needs_reference, takes_rows
from dpo_eqx.cli.compose.optimizer import (
    compose_optimizer,
    compose_schedule,
    decays,
    learning_rates,
)
from dpo_eqx.cli.compose.score import check_weights, compose_score
from dpo_eqx.cli.settings.settings import Settings
from dpo_eqx.data._records.records import Form

from ..policies import VOCAB, Perceptron


def settings(**given):
    return Settings(model="m", data=("d",), output=Path("o"), **given)


def log_probs(seed):
    rng = np.random.default_rng(seed)
    chosen, rejected = jnp.asarray(rng.normal(-20, 3, (2, 5)), jnp.float32)
    counts = jnp.asarray(rng.integers(1, 9, (2, 5)), jnp.int32)
    return PairLogProbs(chosen, rejected, *counts)


POLICY, REFERENCE = log_probs(0), log_probs(1)


def same(loss, want):
    got = loss(POLICY, REFERENCE)
    assert np.array_equal(got.loss, want.loss)
    assert np.array_equal(got.chosen_reward, want.chosen_reward)


def test_one_loss():
    got = compose_loss(settings(beta=0.3, label_smoothing=0.1, divergence="forward_kl"))
    want = losses.dpo(
        POLICY, REFERENCE, beta=0.3, label_smoothing=0.1, divergence=losses.forward_kl
    )
    same(got, want)


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "exo", "nca", "sppo", "alpha_po"])
def test_a_loss_by_the_name_of_its_function(name):
    same(compose_loss(settings(loss=(name,))), getattr(losses, name)(POLICY, REFERENCE))


def test_cdpo_is_dpo_with_flipped_labels():
    loss = compose_loss(settings(loss=("cdpo",), label_smoothing=0.2))
    same(loss, losses.dpo(POLICY, REFERENCE, label_smoothing=0.2))
    with pytest.raises(ValueError, match=r"`--loss cdpo` .* give that as `--label-smoothing`"):
        compose_loss(settings(loss=("cdpo",)))


def test_weights_of_pairs_and_of_tokens():
    """WPO and LD-DPO, as the library's own step has them."""
    rng = np.random.default_rng(0)
    policy = Perceptron(jax.random.key(0))
    ids, short = rng.integers(0, VOCAB, (3, 3, 5)), np.arange(5) < 3
    masks = [np.ones((3, 5), bool), np.tile(short, (3, 1)), np.ones((3, 5), bool)]
    sides = [Tokens(*side) for side in zip(ids, masks, strict=True)]
    batch, form = PreferenceBatch(*sides), Form("explicit prompt")
    given = settings(wpo=True)
    score = compose_score(form, given, packed=False)
    ours, plain = score(policy, batch), score_pairs(policy, batch, confidence=True)
    want = losses.wpo(losses.dpo)(plain, plain).loss
    assert np.array_equal(compose_loss(given)(ours, ours).loss, want)
    assert not np.allclose(want, losses.dpo(plain, plain).loss)
    score = compose_score(form, settings(ld_alpha=0.25), packed=False)
    assert np.array_equal(score(policy, batch).rejected, ld_score(0.25)(policy, batch).rejected)
    assert not np.allclose(score(policy, batch).rejected, plain.rejected)


@pytest.mark.parametrize(
    ("form", "given", "message"),
    [
        ("unpaired", {"wpo": True}, "`--wpo` is for pairs; the data are"),
        ("unpaired", {"ld_alpha": 0.5}, "`--ld-alpha` is for pairs"),
        ("explicit prompt", {"ld_alpha": 0.5}, "as the sums reference_chosen. Leave"),
    ],
)
def test_data_that_cannot_be_weighed(form, given, message):
    numbers = ("reference_chosen",) if form == "explicit prompt" else ()
    with pytest.raises(ValueError, match=message):
        check_weights(Form(form, numbers=numbers), settings(**given))


def test_wpo_is_for_losses_of_pairs():
    with pytest.raises(ValueError, match="`--wpo` weighs pairs"):
        compose_loss(settings(loss=("kto",), wpo=True))


def test_ipo_is_that_of_the_field():
    same(compose_loss(settings(loss=("ipo",))), losses.BY_NAME["ipo"](POLICY, REFERENCE))


def test_several_losses_share_what_they_take():
    given = {"loss": ("sigmoid", "simpo", "sft"), "loss_weights": (1.0, 0.5, 0.25), "beta": 0.7}
    got = compose_loss(settings(**given, loss_options=("gamma=0.4",)))
    parts = [
        losses.dpo(POLICY, REFERENCE, beta=0.7),
        losses.simpo(POLICY, REFERENCE, beta=0.7, gamma=0.4),
        losses.sft(POLICY, REFERENCE),
    ]
    want = parts[0].loss + 0.5 * parts[1].loss + 0.25 * parts[2].loss
    assert np.allclose(got(POLICY, REFERENCE).loss, want, rtol=1e-6)


def test_a_divergence_with_a_number():
    got = compose_loss(settings(divergence="alpha_divergence=0.5"))
    same(got, losses.dpo(POLICY, REFERENCE, divergence=losses.alpha_divergence(0.5)))


def test_without_reference():
    loss = compose_loss(settings(reference_free=True))
    assert not needs_reference(loss)
    assert np.array_equal(loss(POLICY, None).chosen_reward, np.float32(0.1) * POLICY.chosen)
    assert needs_reference(compose_loss(settings()))
    assert not needs_reference(compose_loss(settings(loss=("simpo", "sft"))))


@pytest.mark.parametrize("name", sorted(losses.BY_NAME))
def test_every_name_composes(name):
    more = ("offset=1",) if name == "odpo" else ()
    loss = compose_loss(settings(loss=(name,), loss_options=more))
    single = name in ("kto", "bco", "apo_zero_unpaired")
    assert takes_rows(loss, unpaired=True) == (single or name == "sft")
    assert takes_rows(loss, unpaired=False) != single
    assert needs_reference(loss) == (name not in ("simpo", "cpo", "orpo", "alphapo", "sft"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": ("sigmoyd",)}, "Did you mean `sigmoid`"),
        ({"loss": ("hinge",), "label_smoothing": 0.1}, "`--label-smoothing` is 0.1, but none of"),
        ({"loss_options": ("gama=1",)}, "`--loss-options gama` is 1.0, but none .* `beta`"),
        ({"loss_options": ("beta=1",), "beta": 1.0}, "both give `beta`"),
        ({"loss_options": ("gamma",)}, "must be of the form NAME=VALUE"),
        ({"loss": ("simpo",), "loss_options": ("gamma=x",)}, "must be a number; got 'x'"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` must be in \[0, 0.5\)"),
        ({"divergence": "kl"}, "`--divergence` must be one of reverse_kl, .* got 'kl'"),
        ({"divergence": "alpha_divergence"}, "alpha_divergence=A; got"),
        ({"loss": ("nca_pair",), "divergence": "forward_kl"}, "`--divergence` is"),
        ({"loss": ("sigmoid", "kto")}, "of pairs only, or of single completions only"),
    ],
)
def test_wrong_losses(given, message):
    with pytest.raises(ValueError, match=message):
        compose_loss(settings(**given))


def rates(total, **given):
    given = settings(learning_rate=0.5, **given)
    return learning_rates(compose_schedule(given, total), total)


def test_schedules():
    steps = np.arange(10)
    assert rates(10, schedule="constant").tolist() == [0.5] * 10
    assert np.allclose(rates(10, schedule="linear"), 0.5 * (10 - steps) / 10)
    want = np.where(steps < 4, steps / 4, (10 - steps) / 6)
    assert np.allclose(rates(10, schedule="linear", warmup_steps=4), 0.5 * want)
    cosine = 0.5 + 0.5 * np.cos(np.pi * (steps - 4) / 6)
    want = np.where(steps < 4, steps / 4, cosine)
    assert np.allclose(rates(10, schedule="cosine", warmup_steps=4), 0.5 * want)
    want = np.minimum(steps / 4, 1)
    assert np.allclose(rates(10, schedule="constant", warmup_steps=4), 0.5 * want)
    assert np.allclose(rates(3, warmup_steps=4), [0, 0.125, 0.25])


PARAMS = {
    "attention": {"weight": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])},
    "attention_norm": {"weight": jnp.array([4.0])},
    "query_norm": {"weight": jnp.array([4.0])},
    "lora": {"down": jnp.array([5.0])},
}


def test_biases_and_norms_do_not_decay():
    assert decays(PARAMS) == {
        "attention": {"weight": True, "bias": False},
        "attention_norm": {"weight": False},
        "query_norm": {"weight": False},
        "lora": {"down": True},
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "lion"])
def test_decay_and_clipping(name):
    """Against arithmetic by hand, where the gradient is 0 or the direction is known."""
    given = {"optimizer": name, "schedule": "constant", "learning_rate": 0.5}
    plain = settings(**given, weight_decay=0.25)
    optimizer = compose_optimizer(plain, compose_schedule(plain, 4))
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    assert np.allclose(updates["attention"]["weight"], [-0.125, 0.25])
    for layer, leaf in (("attention", "bias"), ("attention_norm", "weight")):
        assert np.allclose(updates[layer][leaf], 0)


@pytest.mark.parametrize(("limit", "scale"), [(0.0, 1.0), (0.5, 0.1), (10.0, 1.0)])
def test_clipping_by_the_global_norm(limit, scale):
    given = settings(optimizer="sgd", schedule="constant", learning_rate=0.5, max_grad_norm=limit)
    optimizer = compose_optimizer(given, compose_schedule(given, 4))
    gradients = {"one": jnp.array([3.0]), "other": jnp.array([4.0])}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    assert np.allclose([updates["one"][0], updates["other"][0]], [-1.5 * scale, -2 * scale])


@pytest.mark.parametrize(
    ("given", "steps"),
    [({}, 7), ({"epochs": 3}, 21), ({"steps": 10}, 10), ({"steps": 10, "epochs": 1}, 7)],
)
def test_total_steps(given, steps):
    assert total_steps(settings(**given), 7) == steps
