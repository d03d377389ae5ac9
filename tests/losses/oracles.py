"""Each loss written again from its paper, in float64 NumPy, with its derivatives by hand.

An oracle takes the arrays of `Pairs` or `Singles` and returns the loss of each row, then the
derivatives of each row's loss with respect to its own log-probabilities.
"""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Pairs(NamedTuple):
    """Summed log-probabilities `l` and `r` (reference), lengths `n`, of chosen and rejected."""

    lw: Array
    ll: Array
    rw: Array
    rl: Array
    nw: Array
    nl: Array

    @property
    def rhos(self) -> tuple[Array, Array]:
        return self.lw - self.rw, self.ll - self.rl

    @property
    def averages(self) -> tuple[Array, Array]:
        return self.lw / self.nw, self.ll / self.nl


class Singles(NamedTuple):
    """The same of single completions, with those of the mismatched completions, `kl`."""

    l: Array  # noqa: E741
    r: Array
    kl: Array
    rkl: Array
    label: Array


def sigma(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def log_sigma(x: Array) -> Array:
    return -np.logaddexp(0, -x)


def cross_entropy(z: Array, eps=0.0) -> tuple[Array, Array]:
    """The cDPO loss of a margin, and its derivative."""
    loss = -(1 - eps) * log_sigma(z) - eps * log_sigma(-z)
    return loss, sigma(z) - (1 - eps)


def of_difference(p: Pairs, beta, value):
    """A loss of z = beta (rho_w - rho_l), from `value(z) -> loss, derivative`."""
    w, l = p.rhos  # noqa: E741
    loss, slope = value(beta * (w - l))
    return loss, beta * slope, -beta * slope


def dpo(p, beta=0.1, label_smoothing=0.0):
    return of_difference(p, beta, lambda z: cross_entropy(z, label_smoothing))


def robust_dpo(p, beta=0.1, label_smoothing=0.1):
    def value(z):
        e, scale = label_smoothing, 1 - 2 * label_smoothing
        loss = (-(1 - e) * log_sigma(z) + e * log_sigma(-z)) / scale
        return loss, (-(1 - e) * sigma(-z) - e * sigma(z)) / scale

    return of_difference(p, beta, value)


def hinge(p, beta=0.1):
    return of_difference(p, beta, lambda z: (np.maximum(0, 1 - z), np.where(z < 1, -1.0, 0.0)))


def ipo(p, beta=0.1):
    w, l = p.rhos  # noqa: E741
    residual = w - l - 1 / (2 * beta)
    return residual**2, 2 * residual, -2 * residual


def exo(p, beta=0.1, label_smoothing=1e-3):
    def value(z):
        q, e = sigma(z), label_smoothing
        kl = q * np.log(q / (1 - e)) + (1 - q) * np.log((1 - q) / e)
        return kl, q * (1 - q) * (np.log(q / (1 - q)) - np.log((1 - e) / e))

    return of_difference(p, beta, value)


def discopop(p, beta=0.1, tau=0.05):
    def value(z):
        m = sigma(z / tau)
        logistic, exponential = -log_sigma(z), np.exp(-z)
        slope = m * (1 - m) / tau * (exponential - logistic)
        return (1 - m) * logistic + m * exponential, slope - (1 - m) * sigma(-z) - m * exponential

    return of_difference(p, beta, value)


def nca(p, beta=0.1):
    w, l = (beta * rho for rho in p.rhos)  # noqa: E741
    loss = -log_sigma(w) - log_sigma(-w) / 2 - log_sigma(-l) / 2
    return loss, beta * (sigma(w) / 2 - sigma(-w)), beta * sigma(l) / 2


def bco_pair(p, beta=0.1, delta=0.0):
    w, l = (beta * rho for rho in p.rhos)  # noqa: E741
    loss = -log_sigma(w - delta) - log_sigma(-(l - delta))
    return loss, -beta * sigma(delta - w), beta * sigma(l - delta)


def sppo(p, beta=0.1):
    w, l = p.rhos  # noqa: E741
    a, b = w - 1 / (2 * beta), l + 1 / (2 * beta)
    return a**2 + b**2, 2 * a, 2 * b


def cal_dpo(p, beta=0.1):
    w, l = p.rhos  # noqa: E741
    contrast, slope = cross_entropy(w - l)
    a, b = w - 1 / (2 * beta), l + 1 / (2 * beta)
    return contrast + a**2 + b**2, slope + 2 * a, -slope + 2 * b


def apo_zero(p, beta=0.1):
    w, l = (beta * rho for rho in p.rhos)  # noqa: E741
    return (
        1 - sigma(w) + sigma(l),
        -beta * sigma(w) * sigma(-w),
        beta * sigma(l) * sigma(-l),
    )


def apo_down(p, beta=0.1):
    w, l = (beta * rho for rho in p.rhos)  # noqa: E741
    apart = beta * sigma(w - l) * sigma(l - w)
    return (
        sigma(w) + 1 - sigma(w - l),
        beta * sigma(w) * sigma(-w) - apart,
        apart,
    )


def dpop(p, beta=0.1, penalty=50.0):
    w, l = p.rhos  # noqa: E741
    loss, slope = cross_entropy(beta * (w - l - penalty * np.maximum(0, -w)))
    return loss, beta * slope * (1 + penalty * (w < 0)), -beta * slope


def odpo(p, beta=0.1, offset=0.0):
    return of_difference(p, beta, lambda z: cross_entropy(z - offset))


def r_dpo(p, beta=0.1, alpha=0.01):
    return of_difference(p, beta, lambda z: cross_entropy(z + alpha * (p.nw - p.nl)))


def chi_po(p, beta=0.1, clip=None):
    w, l = p.rhos  # noqa: E741
    z = beta * (w + np.exp(w) - l - np.exp(l))
    inside = 1.0 if clip is None else abs(z) < clip
    z = z if clip is None else np.clip(z, -clip, clip)
    loss, slope = cross_entropy(z)
    return loss, beta * slope * inside * (1 + np.exp(w)), -beta * slope * inside * (1 + np.exp(l))


def sft(p):
    return -p.lw / p.nw, -1 / p.nw, np.zeros_like(p.lw)


def bradley_terry(p, margin=0.0, label_smoothing=0.0, centering=0.0):
    loss, slope = cross_entropy(p.lw - p.ll - margin, label_smoothing)
    total = p.lw + p.ll
    pull = 2 * centering * total
    return loss + centering * total**2, slope + pull, pull - slope


def xpo(p, beta=0.1, alpha=1e-5, *, chosen_is_reference):
    loss, slope = cross_entropy(beta * (p.rhos[0] - p.rhos[1]))
    share = chosen_is_reference
    bonus = alpha * (p.lw * share + p.ll * (1 - share))
    return loss + bonus, beta * slope + alpha * share, -beta * slope + alpha * (1 - share)


def simpo(p, beta=2.0, gamma=1.0):
    a, b = p.averages
    loss, slope = cross_entropy(beta * (a - b) - gamma)
    return loss, beta * slope / p.nw, -beta * slope / p.nl


def alpha_po(p, beta=2.0, alpha=0.25, gamma=0.5):
    a, b = p.averages
    loss, slope = cross_entropy(beta * (np.exp(-alpha * b) - np.exp(-alpha * a)) / alpha - gamma)
    return (
        loss,
        beta * slope * np.exp(-alpha * a) / p.nw,
        -beta * slope * np.exp(-alpha * b) / p.nl,
    )


def cpo(p, beta=0.1, alpha=1.0):
    loss, slope = cross_entropy(beta * (p.lw - p.ll))
    return loss - alpha * p.lw / p.nw, beta * slope - alpha / p.nw, -beta * slope


def orpo(p, beta=0.1):
    a, b = p.averages
    odds_w, odds_l = np.exp(a) / (1 - np.exp(a)), np.exp(b) / (1 - np.exp(b))
    loss, slope = cross_entropy(np.log(odds_w / odds_l))
    return (
        -a + beta * loss,
        (-1 + beta * slope / (1 - np.exp(a))) / p.nw,
        -beta * slope / (1 - np.exp(b)) / p.nl,
    )


def aot(p, beta=0.1, label_smoothing=0.0):
    u, v = p.lw - p.ll, p.rw - p.rl
    ranks = np.argsort(np.argsort(u))
    loss, slope = cross_entropy(beta * (u - np.sort(v)[ranks]), label_smoothing)
    return loss, beta * slope, -beta * slope


def aot_unpaired(p, beta=0.1, label_smoothing=0.0):
    u, v = p.rhos
    rank_u, rank_v = np.argsort(np.argsort(u)), np.argsort(np.argsort(v))
    loss, slope = cross_entropy(beta * (u - np.sort(v)[rank_u]), label_smoothing)
    # A rejected one's derivative is that of the loss it takes part in.
    return loss, beta * slope, -(beta * slope)[np.argsort(u)][rank_v]


def beta_dpo(p, beta=0.1, alpha=0.6, margin=0.0):
    """The derivative with `beta_b` held, as the paper detaches it."""
    w, l = p.rhos  # noqa: E741
    batch_beta = np.maximum(beta * (1 + alpha * (np.mean(beta * (w - l)) - margin)), 1e-3)
    loss, slope = cross_entropy(batch_beta * (w - l))
    return loss, batch_beta * slope, -batch_beta * slope


def kto(p, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    point = max(0.0, np.mean(p.kl - p.rkl))
    sign = np.where(p.label, 1, -1)
    value = sigma(sign * beta * (p.l - p.r - point))
    weight = np.where(p.label, desirable_weight, undesirable_weight)
    return weight * (1 - value), -weight * sign * beta * value * (1 - value)


def apo_zero_unpaired(p, beta=0.1):
    reward = sigma(beta * (p.l - p.r))
    slope = beta * reward * (1 - reward)
    return np.where(p.label, 1 - reward, reward), np.where(p.label, -slope, slope)


def bco(p, beta=0.1, delta=0.0):
    sign = np.where(p.label, 1, -1)
    loss, slope = cross_entropy(sign * (beta * (p.l - p.r) - delta))
    return loss, sign * beta * slope
