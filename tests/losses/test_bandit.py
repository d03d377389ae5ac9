"""A test of meaning: on a bandit each loss is minimised by the policy that its theory names.

One prompt, 20 answers of one token, known rewards; preferences follow Bradley-Terry. The expected
loss over all pairs is exact, and minimised by plain gradient descent on the policy's logits.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import PairLogProbs, UnpairedLogProbs, losses

ANSWERS, BETA = 20, 0.5
RANDOM = np.random.default_rng(7)
REWARD = RANDOM.uniform(-0.6, 0.6, ANSWERS)
REFERENCE = RANDOM.dirichlet(np.full(ANSWERS, 10.0))
WINS = 1 / (1 + np.exp(REWARD[None, :] - REWARD[:, None]))  # WINS[i, j]: i is preferred to j
CHOSEN, REJECTED = (x.ravel() for x in np.indices((ANSWERS, ANSWERS)))
ONES = np.ones(ANSWERS**2, np.int32)
RHO = np.linspace(-12, 12, 200_001)


def pairs(log_probs):
    return PairLogProbs(log_probs[CHOSEN], log_probs[REJECTED], ONES, ONES)


def expected(loss, wins=WINS, reference=REFERENCE):
    """The mean of the loss over all ordered pairs, each weighed by its probability."""
    weight, known = wins.ravel() / ANSWERS**2, pairs(np.log(reference))

    def mean(logits):
        return (weight * loss(pairs(jax.nn.log_softmax(logits)), known).loss).sum()

    return mean


def minimise(mean, rate, steps=4000):
    """Gradient descent with Nesterov's momentum, from the uniform policy."""
    slope = jax.grad(mean)

    def step(carry, _):
        logits, velocity = carry
        velocity = 0.9 * velocity - rate * slope(logits + 0.9 * velocity)
        return (logits + velocity, velocity), None

    start = jnp.zeros(ANSWERS)
    (logits, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, x), None, length=steps))(start)
    return np.asarray(jax.nn.softmax(logits)), np.asarray(slope(logits))


def normalised(weights):
    return weights / weights.sum()


def solved(score):
    """The policy with s(rho) = r / beta + c, by interpolation of s and bisection in c."""
    values = np.asarray(score(jnp.asarray(RHO)))

    def policy(c):
        return REFERENCE * np.exp(np.interp(REWARD / BETA + c, values, RHO))

    low, high = -10.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if policy(middle).sum() > 1 else (middle, high)
    return policy(low)


def distance(p, q):
    return abs(p - q).sum() / 2


BRADLEY_TERRY = normalised(REFERENCE * np.exp(REWARD / BETA))
# The mean preference over opponents, on which IPO regresses.
ADVANTAGE = (2 * WINS.mean(axis=1) - 1) / (2 * BETA)


def test_dpo_reaches_the_optimum_of_the_kl_regularised_reward():
    policy, _ = minimise(expected(partial(losses.dpo, beta=BETA)), rate=40.0)
    assert distance(policy, BRADLEY_TERRY) < 1e-6
    assert distance(policy, REFERENCE) > 0.1


@pytest.mark.parametrize(
    "divergence",
    [
        losses.forward_kl,
        losses.jensen_shannon,
        pytest.param(losses.alpha_divergence(0.5), marks=pytest.mark.slow),
    ],
    ids=["forward_kl", "jensen_shannon", "alpha_divergence"],
)
def test_f_divergences_reach_their_own_optima(divergence):
    """r = beta f'(pi / pi_ref) + a constant, on the support of the reference."""
    policy, _ = minimise(expected(partial(losses.dpo, beta=BETA, divergence=divergence)), rate=20.0)
    assert distance(policy, solved(divergence)) < 1e-6
    assert distance(policy, BRADLEY_TERRY) > 1e-3


def test_chi_po_reaches_the_optimum_of_its_mixed_divergence():
    """r = beta (pi / pi_ref + log(pi / pi_ref)) + a constant."""
    policy, _ = minimise(expected(partial(losses.chi_po, beta=BETA)), rate=10.0)
    assert distance(policy, solved(lambda rho: rho + jnp.exp(rho))) < 1e-6


def test_robust_dpo_undoes_flipped_labels():
    """A tenth of the labels flipped: DPO is pulled off, the robust loss is not."""
    flipped = 0.9 * WINS + 0.1 * WINS.T
    robust = partial(losses.robust_dpo, beta=BETA, label_smoothing=0.1)
    policy, _ = minimise(expected(robust, flipped), rate=40.0)
    assert distance(policy, BRADLEY_TERRY) < 1e-6
    fooled, _ = minimise(expected(partial(losses.dpo, beta=BETA), flipped), rate=40.0)
    assert distance(fooled, BRADLEY_TERRY) > 1e-2


def test_ipo_regresses_on_the_mean_preference():
    policy, _ = minimise(expected(partial(losses.ipo, beta=BETA)), rate=2.0)
    assert distance(policy, normalised(REFERENCE * np.exp(ADVANTAGE))) < 1e-6


def test_simpo_without_a_margin_is_bradley_terry_on_a_uniform_reference():
    policy, _ = minimise(expected(partial(losses.simpo, beta=BETA, gamma=0.0)), rate=40.0)
    assert distance(policy, normalised(np.exp(REWARD / BETA))) < 1e-6


def test_simpo_with_a_margin_is_stationary_where_wins_balance_losses():
    gamma = 0.5
    policy, _ = minimise(expected(partial(losses.simpo, beta=BETA, gamma=gamma)), rate=40.0)
    margin = BETA * (np.log(policy)[:, None] - np.log(policy)[None, :])
    push = WINS / (1 + np.exp(margin - gamma))
    np.testing.assert_allclose(push.sum(axis=1), push.sum(axis=0), atol=1e-7)
    assert distance(policy, normalised(np.exp(REWARD / BETA))) > 1e-3


GOOD = WINS.mean(axis=1)  # how often each answer is called desirable


def expected_unpaired(loss, good=GOOD):
    label = jnp.arange(2 * ANSWERS) < ANSWERS
    weight = np.concatenate([good, 1 - good]) / ANSWERS
    known = np.log(np.concatenate([REFERENCE, REFERENCE]))

    def mean(logits):
        log_probs = jnp.tile(jax.nn.log_softmax(logits), 2)
        # The mismatched completions are the reference's: the point of KTO is then 0.
        policy = UnpairedLogProbs(log_probs, label, kl=known)
        return (weight * loss(policy, UnpairedLogProbs(known, label, kl=known)).loss).sum()

    return mean


def test_bco_reaches_the_log_odds_of_desirable():
    """With the shift that normalises it: beta rho - delta = logit of the share of good labels."""
    odds = (GOOD / (1 - GOOD)) ** (1 / BETA)
    delta = -BETA * float(np.log((REFERENCE * odds).sum()))
    policy, _ = minimise(expected_unpaired(partial(losses.bco, beta=BETA, delta=delta)), rate=20.0)
    assert distance(policy, normalised(REFERENCE * odds)) < 1e-6


def test_kto_is_stationary_only_where_labels_balance():
    """Its slope in rho is beta s(1 - s)[lambda_U (1 - p) - lambda_D p]: 0 at no finite rho else."""
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    loss = partial(losses.kto, beta=BETA, **weights)
    balanced = np.full(ANSWERS, 0.8 / 2.0)
    logits = jnp.asarray(RANDOM.normal(size=ANSWERS))
    np.testing.assert_allclose(jax.grad(expected_unpaired(loss, balanced))(logits), 0, atol=1e-15)
    policy = np.asarray(jax.nn.softmax(logits))
    s = 1 / (1 + np.exp(-BETA * np.log(policy / REFERENCE)))
    slope = BETA * s * (1 - s) * (0.8 * (1 - GOOD) - 1.2 * GOOD) / ANSWERS
    got = jax.grad(expected_unpaired(loss))(logits)
    np.testing.assert_allclose(got, slope - policy * slope.sum(), rtol=1e-10, atol=1e-15)


def test_kto_moves_probability_to_what_the_majority_prefers():
    loss = partial(losses.kto, beta=BETA)
    start = jnp.log(REFERENCE)
    slope = jax.jit(jax.grad(expected_unpaired(loss)))
    logits = start
    for _ in range(200):
        logits = logits - 5.0 * slope(logits)
    gained = np.asarray(jax.nn.log_softmax(logits)) - np.log(REFERENCE)
    liked = GOOD > 0.5
    assert gained[liked].min() > gained[~liked].max()
