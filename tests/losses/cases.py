"""The one table of losses that all the tests here go through, and log-probabilities for them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_eqx import PairLogProbs, UnpairedLogProbs, losses

from . import oracles
from .oracles import Pairs, Singles


@dataclass(frozen=True)
class Case:
    """A loss, what it needs, and hyper-parameters that are none of the defaults."""

    loss: Callable[..., Any]
    hyper: dict[str, float] = field(default_factory=dict)
    at_reference: float | None = None  # with the policy at the reference, all at their defaults
    reward: Callable[[Any, float], Any] = lambda p, beta: tuple(beta * rho for rho in p.rhos)
    reference: bool = True
    lengths: bool = False
    unpaired: bool = False
    divergence: bool = False
    smooth: bool = True
    needed: dict[str, float] = field(default_factory=dict)  # what has no default
    detached: tuple[str, ...] = ()  # hyper-parameters through which no gradient flows

    @property
    def name(self) -> str:
        return self.loss.__name__

    @property
    def oracle(self) -> Callable[..., Any]:
        return getattr(oracles, self.name)


LOG2 = float(np.log(2))
EPS = 1e-3  # the default label smoothing of `exo`
AVERAGE = {
    "reference": False,
    "lengths": True,
    "reward": lambda p, beta: tuple(beta * a for a in p.averages),
}
SINGLE = {"unpaired": True, "reward": lambda p, beta: beta * (p.l - p.r)}

CASES = [
    Case(losses.dpo, {"beta": 0.3, "label_smoothing": 0.2}, LOG2, divergence=True),
    Case(losses.robust_dpo, {"beta": 0.3, "label_smoothing": 0.2}, LOG2, divergence=True),
    Case(losses.hinge, {"beta": 0.3}, 1.0, divergence=True, smooth=False),
    Case(losses.ipo, {"beta": 0.3}, 25.0, divergence=True),
    Case(
        losses.exo,
        {"beta": 0.3, "label_smoothing": 0.05},
        -LOG2 - 0.5 * float(np.log(EPS * (1 - EPS))),
        divergence=True,
    ),
    Case(losses.discopop, {"beta": 0.3, "tau": 0.2}, 0.5 * LOG2 + 0.5, divergence=True),
    Case(losses.nca, {"beta": 0.3}, 2 * LOG2),
    Case(losses.bco_pair, {"beta": 0.3, "delta": 0.4}, 2 * LOG2, detached=("delta",)),
    Case(losses.sppo, {"beta": 0.3}, 50.0),
    Case(losses.cal_dpo, {"beta": 0.3}, 50.0 + LOG2),
    Case(losses.apo_zero, {"beta": 0.3}, 1.0),
    Case(losses.apo_down, {"beta": 0.3}, 1.0),
    Case(losses.dpop, {"beta": 0.3, "penalty": 2.0}, LOG2, smooth=False),
    Case(losses.odpo, {"beta": 0.3, "offset": 0.7}, LOG2),
    Case(losses.r_dpo, {"beta": 0.3, "alpha": 0.05}, lengths=True),
    Case(
        losses.xpo,
        {"beta": 0.3, "alpha": 0.2, "chosen_is_reference": 0.3},
        needed={"chosen_is_reference": 1.0},
    ),
    Case(losses.chi_po, {"beta": 0.3}, LOG2),
    Case(losses.chi_po, {"beta": 0.3, "clip": 0.5}, LOG2, smooth=False),
    Case(losses.aot, {"beta": 0.3, "label_smoothing": 0.2}, LOG2),
    Case(losses.aot_unpaired, {"beta": 0.3, "label_smoothing": 0.2}, LOG2),
    Case(losses.beta_dpo, {"beta": 0.3, "alpha": 0.8, "margin": 0.2}, LOG2),
    Case(
        losses.sft,
        reference=False,
        lengths=True,
        reward=lambda p, beta: (p.lw, p.ll),
    ),
    Case(losses.simpo, {"beta": 3.0, "gamma": 0.5}, **AVERAGE),
    Case(
        losses.alpha_po,
        {"beta": 3.0, "alpha": 0.4, "gamma": 0.2},
        **(
            AVERAGE
            | {
                "reward": lambda p, beta: tuple(
                    beta * (1 - np.exp(-0.4 * a)) / 0.4 for a in p.averages
                )
            }
        ),
    ),
    Case(
        losses.cpo,
        {"beta": 0.3, "alpha": 0.5},
        **(AVERAGE | {"reward": lambda p, beta: (beta * p.lw, beta * p.ll)}),
    ),
    Case(losses.orpo, {"beta": 0.3}, **AVERAGE),
    Case(
        losses.bradley_terry,
        {"margin": 0.4, "label_smoothing": 0.2, "centering": 0.01},
        reference=False,
        reward=lambda p, beta: (p.lw, p.ll),
    ),
    Case(
        losses.kto, {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}, 0.5, **SINGLE
    ),
    Case(losses.apo_zero_unpaired, {"beta": 0.3}, 0.5, **SINGLE),
    Case(losses.bco, {"beta": 0.3, "delta": 0.4}, LOG2, detached=("delta",), **SINGLE),
]
NAMES = [case.name + ("_clipped" if "clip" in case.hyper else "") for case in CASES]
DIVERGENCES = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "jensen_shannon": losses.jensen_shannon,
    "alpha_divergence": losses.alpha_divergence(0.7),
}


def draw(case: Case, *, pairs: int = 6, seed: int = 0) -> Pairs | Singles:
    """Log-probabilities whose log-ratios are of the size of 1, in float64."""
    random = np.random.default_rng(seed)
    if case.unpaired:
        r, rkl = random.normal(-30, 5, (2, pairs))
        shift = random.normal(0.3, 1, (2, pairs))
        label = np.arange(pairs) % 3 != 1
        return Singles(r + shift[0], r, rkl + shift[1] + 0.2, rkl, label)
    lengths = random.integers(1, 30, (2, pairs)).astype(float)
    rw, rl = -lengths * random.uniform(0.3, 3, (2, pairs))
    w, l = random.normal(0, 1, (2, pairs))  # noqa: E741
    # Not above 0: they are logarithms of probabilities.
    return Pairs(np.minimum(rw + w, -0.1), np.minimum(rl + l, -0.1), rw, rl, *lengths)


def records(case: Case, p: Pairs | Singles, dtype: Any = jnp.float64, weight: Any = None):
    """The policy's and the reference's records, as JAX arrays of `dtype`."""
    weight = None if weight is None else jnp.asarray(weight, dtype)
    if isinstance(p, Singles):
        l, r, kl, rkl = (jnp.asarray(x, dtype) for x in p[:4])  # noqa: E741
        label = jnp.asarray(p.label)
        return (
            UnpairedLogProbs(l, label, kl=kl, weight=weight),
            UnpairedLogProbs(r, label, kl=rkl, weight=weight),
        )
    lw, ll, rw, rl = (jnp.asarray(x, dtype) for x in p[:4])
    lengths = [jnp.asarray(n, jnp.int32) for n in p[4:]]
    policy = PairLogProbs(lw, ll, *lengths, weight=weight)
    return policy, PairLogProbs(rw, rl, *lengths) if case.reference else None


def gradient(loss: Callable[..., Any], policy: Any, reference: Any, **hyper: Any):
    """The result, and the gradient of the summed loss with respect to the policy's floats."""
    floats, rest = split(policy)

    def total(floats):
        result = loss(join(floats, rest), reference, **hyper)
        return result.loss.sum(), result

    slopes, result = jax.grad(total, has_aux=True)(floats)
    return result, slopes


def split(policy: PairLogProbs | UnpairedLogProbs):
    """The log-probabilities that gradients flow into, and a function of the rest."""
    names = ("chosen", "rejected") if isinstance(policy, PairLogProbs) else ("completion",)
    return tuple(getattr(policy, name) for name in names), (names, policy)


def join(floats, rest):
    names, policy = rest
    return replace(policy, **dict(zip(names, floats, strict=True)))


def close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    """Asserts |difference| <= tolerance (1 + |value|)."""
    np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance)
