"""A bandit, which is one prompt with a few answers, and the policies that minimise losses on it.

Labels follow Bradley-Terry, and there are infinitely many. `rho` is `log(pi / pi_ref)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from . import sentences

PerAnswer = Float[Array, " answers"]


class Bandit(NamedTuple):
    """The reward and the log-probability under the reference of each answer."""

    reward: PerAnswer
    log_reference: PerAnswer

    @property
    def wins(self) -> Float[Array, "answers answers"]:
        """The probability that the answer of the row is preferred to that of the column."""
        return sentences.preferences(self.reward)

    @property
    def share(self) -> PerAnswer:
        """How often an answer is preferred to one that is drawn uniformly."""
        return self.wins.mean(axis=1)


def draw(answers: int, key: PRNGKeyArray) -> Bandit:
    """Rewards within 0.6 of 0, and a reference that is not far from uniform."""
    for_reward, for_reference = jax.random.split(key)
    reward = jax.random.uniform(for_reward, (answers,), minval=-0.6, maxval=0.6)
    return Bandit(reward, jax.nn.log_softmax(0.3 * jax.random.normal(for_reference, (answers,))))


def boltzmann(bandit: Bandit, beta: float) -> PerAnswer:
    """`rho = r / beta + c`: the policy of most reward minus `beta` times KL."""
    return sentences.optimum(bandit.log_reference, bandit.reward, beta)


def by_divergence(score: Callable[[Array], Array]) -> Callable[[Bandit, float], PerAnswer]:
    """`score(rho) = r / beta + c`, for a score that rises."""
    return lambda bandit, beta: solve(score, bandit.reward / beta, bandit.log_reference)


def of_likelihood(score: Callable[[Array], Array]) -> Callable[[Bandit, float], PerAnswer]:
    """`score(log pi) = r / beta + c`: there is no reference."""
    return lambda bandit, beta: solve(score, bandit.reward / beta, jnp.zeros_like(bandit.reward))


def of_ipo(bandit: Bandit, beta: float) -> PerAnswer:
    """`rho = (2 w - 1) / (2 beta) + c` with the share `w` of comparisons that are won."""
    return jax.nn.log_softmax(bandit.log_reference + (2 * bandit.share - 1) / (2 * beta))


def of_bco(bandit: Bandit, beta: float) -> PerAnswer:
    """`rho = logit(w) / beta + c`."""
    return jax.nn.log_softmax(bandit.log_reference + jax.scipy.special.logit(bandit.share) / beta)


def of_sft(bandit: Bandit, beta: float) -> PerAnswer:
    """`pi = w c`: answers are as likely as they are chosen, whatever `beta` is."""
    return jnp.log(bandit.share / bandit.share.sum())


def solve(score: Callable[[Array], Array], target: PerAnswer, base: PerAnswer) -> PerAnswer:
    """The policy with `score(log pi - base) = target + c`, by bisection in `c`."""
    rho = jnp.linspace(-12.0, 12.0, 20_001)

    def policy(c):
        return base + jnp.interp(target + c, score(rho), rho)

    def halve(bounds, _):
        low, high = bounds
        middle = (low + high) / 2
        is_too_much = jnp.exp(policy(middle)).sum() > 1
        return (jnp.where(is_too_much, low, middle), jnp.where(is_too_much, middle, high)), None

    (low, _), _ = jax.lax.scan(halve, (jnp.array(-40.0), jnp.array(40.0)), length=40)
    return jax.nn.log_softmax(policy(low))


def distance(
    some: Float[np.ndarray, "*rest answers"], others: Float[np.ndarray, "*rest answers"]
) -> Float[np.ndarray, "*rest"]:
    """The total variation between policies, which are given as log-probabilities."""
    return abs(np.exp(some) - np.exp(others)).sum(axis=-1) / 2
