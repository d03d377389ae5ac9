"""The score of diffusion models, against the formula of the paper in NumPy."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses

PAIRS, SHAPE = 3, (2, 2)
RANDOM = np.random.default_rng(0)
CHOSEN, REJECTED, NOISE, OTHER = RANDOM.normal(size=(4, PAIRS, *SHAPE))
TIME = RANDOM.uniform(0.2, 1.2, PAIRS)
WEIGHT = np.array([1.0, 0.0, 2.5])
BETA = 3.0


def angles(time):
    return jnp.cos(time), jnp.sin(time)


def straight(time):
    return 1 - time / 2, time / 2


class Denoiser(eqx.Module):
    """Predicts the noise, or any other target from the same guess of the noise."""

    matrix: jax.Array
    schedule: object = angles
    prediction: str = "epsilon"

    def __call__(self, noisy, time, condition=None, *, key=None):
        noise = jnp.tanh((self.matrix @ noisy.ravel()).reshape(noisy.shape) + time)
        if condition is not None:
            noise = noise * condition["scale"]
        if key is not None:
            noise = noise + jax.random.normal(key, noise.shape)
        alpha, sigma = self.schedule(time)
        image = (noisy - sigma * noise) / alpha
        targets = {
            "epsilon": noise,
            "x0": image,
            "v": alpha * noise - sigma * image,
            "flow": noise - image,
        }
        return targets[self.prediction]


MATRICES = RANDOM.normal(size=(2, 4, 4))
POLICY, REFERENCE = map(Denoiser, map(jnp.asarray, MATRICES))
BATCH = dpx.DenoisingBatch(CHOSEN, REJECTED, NOISE, TIME, rejected_noise=OTHER, weight=WEIGHT)


def error(matrix, image, noise, time, alpha, sigma):
    """The squared error of one denoiser on one image, as the paper writes it."""
    noisy = alpha * image + sigma * noise
    predicted = np.tanh((matrix @ noisy.ravel()).reshape(SHAPE) + time)
    return np.sum((noise - predicted) ** 2)


def papers_loss(omega):
    """Equation 14 for each pair, with `beta T` of `BETA`."""
    values = []
    for good, bad, eps_w, eps_l, t in zip(CHOSEN, REJECTED, NOISE, OTHER, TIME, strict=True):
        of_w, of_l = (
            error(MATRICES[0], x, eps, t, np.cos(t), np.sin(t))
            - error(MATRICES[1], x, eps, t, np.cos(t), np.sin(t))
            for x, eps in ((good, eps_w), (bad, eps_l))
        )
        values.append(np.log1p(np.exp(BETA * omega(t) * (of_w - of_l))))
    return np.array(values)


@pytest.mark.parametrize(
    ("omega", "papers"), [(None, lambda t: 1), (lambda t: t**2, lambda t: t**2)]
)
def test_dpo_is_equation_14(omega, papers):
    score = eqx.filter_jit(dpx.denoising_score(angles, omega=omega))
    policy, reference = score(POLICY, BATCH), score(REFERENCE, BATCH)
    got = losses.dpo(policy, reference, beta=BETA).loss
    np.testing.assert_allclose(got, papers_loss(papers), rtol=1e-10)
    np.testing.assert_array_equal(policy.weight, WEIGHT)


@pytest.mark.parametrize(
    ("prediction", "schedule", "omega"),
    [
        ("x0", angles, lambda alpha, sigma: (alpha / sigma) ** 2),
        ("v", angles, lambda alpha, sigma: alpha**2),
        ("flow", straight, lambda alpha, sigma: alpha**2),
    ],
)
def test_one_denoiser_has_one_score_whatever_it_predicts(prediction, schedule, omega):
    """With the weights of `docs/losses.md` every error is that of the noise."""
    same = eqx.tree_at(
        lambda d: d.matrix,
        Denoiser(None, schedule, prediction),
        POLICY.matrix,
        is_leaf=lambda x: x is None,
    )
    want = eqx.filter_jit(dpx.denoising_score(schedule))(Denoiser(POLICY.matrix, schedule), BATCH)
    score = dpx.denoising_score(
        schedule, prediction=prediction, omega=lambda t: omega(*schedule(t))
    )
    got = eqx.filter_jit(score)(same, BATCH)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(getattr(got, side), getattr(want, side), rtol=1e-10)


def test_both_images_have_the_same_noise_unless_told():
    score = eqx.filter_jit(dpx.denoising_score(angles))
    shared = score(POLICY, dpx.DenoisingBatch(CHOSEN, CHOSEN, NOISE, TIME))
    np.testing.assert_array_equal(shared.chosen, shared.rejected)
    apart = score(POLICY, dpx.DenoisingBatch(CHOSEN, CHOSEN, NOISE, TIME, rejected_noise=OTHER))
    assert (np.asarray(apart.chosen) != np.asarray(apart.rejected)).all()


def test_the_condition_is_an_argument_of_the_denoiser():
    ones = dpx.DenoisingBatch(CHOSEN, REJECTED, NOISE, TIME, condition={"scale": np.ones(PAIRS)})
    zeros = jax.tree.map(jnp.asarray, ones)
    zeros = eqx.tree_at(lambda b: b.condition["scale"], zeros, jnp.zeros(PAIRS))
    score = eqx.filter_jit(dpx.denoising_score(angles))
    plain = score(POLICY, dpx.DenoisingBatch(CHOSEN, REJECTED, NOISE, TIME))
    np.testing.assert_allclose(score(POLICY, ones).chosen, plain.chosen, rtol=1e-12)
    np.testing.assert_allclose(
        score(POLICY, zeros).rejected, -np.sum(NOISE**2, axis=(1, 2)), rtol=1e-12
    )


def test_every_image_has_its_own_key():
    score = eqx.filter_jit(dpx.denoising_score(angles))
    twice = dpx.DenoisingBatch(*(np.repeat(x[:1], PAIRS, 0) for x in (CHOSEN, CHOSEN, NOISE, TIME)))
    got = score(POLICY, twice, key=jax.random.key(0))
    values = np.concatenate([got.chosen, got.rejected])
    assert len(np.unique(values)) == 2 * PAIRS


def test_sft_is_the_mean_squared_error_of_the_chosen_images():
    scored = eqx.filter_jit(dpx.denoising_score(angles))(POLICY, BATCH)
    want = [
        error(MATRICES[0], x, eps, t, np.cos(t), np.sin(t)) / 4
        for x, eps, t in zip(CHOSEN, NOISE, TIME, strict=True)
    ]
    np.testing.assert_allclose(losses.sft(scored, None).loss, want, rtol=1e-10)


def test_the_first_loss_is_log_2():
    grad = dpx.make_grad(
        partial(losses.dpo, beta=BETA), score=dpx.denoising_score(angles), microbatches=PAIRS
    )
    gradients, metrics = eqx.filter_jit(grad)(POLICY, BATCH, POLICY)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-12)
    assert np.abs(gradients.matrix).max() > 0


def test_mistakes_have_a_remedy(unchecked):
    with pytest.raises(ValueError, match=r"`prediction` must be one of 'epsilon'.*got 'noise'"):
        dpx.denoising_score(angles, prediction="noise")
    with pytest.raises(ValueError, match=r"`rejected` must have the shape of `chosen`"):
        dpx.DenoisingBatch(CHOSEN, REJECTED[:, :1], NOISE, TIME)
    with pytest.raises(ValueError, match=r"`weight` must have one value per pair"):
        dpx.DenoisingBatch(CHOSEN, REJECTED, NOISE, TIME, weight=np.ones(1))
    with pytest.raises(ValueError, match=r"`denoiser\(noisy, time\)` must return .*\(2, 2\)"):
        dpx.denoising_score(angles)(lambda noisy, time: jnp.ravel(noisy), BATCH)
