"""The edges of every loss: 0, the extremes of a dtype and infinities, in four dtypes.

What is right, for the value and for the first and second derivatives with respect to the policy's
log-probabilities:

- **Narrow dtypes.** Float16 and bfloat16 log-probabilities give what the same numbers give in
  float32, and the losses and rewards are float32. Derivatives come back in the dtype of the
  log-probabilities.
- **Finite numbers.** Derivatives are finite. The value is finite too, unless it is too large for
  the dtype; then it is an infinity, never a NaN.
- **A log-ratio of -inf or +inf** (a completion of probability 0 under the policy, or under the
  reference): the value is the limit, finite or infinite. Derivatives are finite: 0 if the limit is
  finite, else of the sign that they have on the way there.
- **Undefined**: a completion of probability 0 under both, and the difference of two infinities of
  one sign. The loss of that pair may be NaN. In a loss that does not couple pairs, the other pairs
  do not notice.
"""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import PairLogProbs, UnpairedLogProbs, losses
from dpo_eqx.losses import _checks as checks, _marks as marks

from .cases import join, split

ORDINARY = -3.5  # a second row of every batch, on which coupled losses can lean
PAIRED = dict(losses.BY_NAME)
UNPAIRED = {name: PAIRED.pop(name) for name in ("kto", "apo_zero_unpaired", "bco")}
DIVERGENCES = {
    "forward_kl": losses.forward_kl,
    "jensen_shannon": losses.jensen_shannon,
    **{f"alpha {a}": losses.alpha_divergence(a) for a in (-1, 0, 0.5, 3.0)},
}
PAIRED |= {
    "dpo smoothed": partial(losses.dpo, label_smoothing=0.2),
    "robust unsmoothed": partial(losses.robust_dpo, label_smoothing=0.0),
    "aot smoothed": partial(losses.aot, label_smoothing=0.2),
    "chi_po clipped": partial(losses.chi_po, clip=3.0),
    "dpop without penalty": partial(losses.dpop, penalty=0.0),
    "cpo without sft": partial(losses.cpo, alpha=0.0),
    "beta_dpo that stands still": partial(losses.beta_dpo, alpha=0.0),
    "discopop of width 1": partial(losses.discopop, tau=1.0),
    "discopop of width 2": partial(losses.discopop, tau=2.0),
    "alphapo downwards": partial(losses.alpha_po, alpha=-0.5),
    "rpo": losses.combine((1, losses.dpo), (0.5, losses.sft)),
    "combine with 0": losses.combine((1, losses.dpo), (0.0, losses.sft)),
    "reference_free": losses.reference_free(losses.dpo),
    "wpo": losses.wpo(losses.dpo),
    "bco_pair of the batch": losses.batch_delta(losses.bco_pair),
    "length_normalized(exo)": losses.length_normalized(losses.exo),
    "length_normalized(discopop)": losses.length_normalized(losses.discopop),
    **{f"dpo {name}": partial(losses.dpo, divergence=s) for name, s in DIVERGENCES.items()},
    "ipo forward_kl": partial(losses.ipo, divergence=losses.forward_kl),
    "discopop forward_kl": partial(losses.discopop, divergence=losses.forward_kl),
    "exo forward_kl": partial(losses.exo, divergence=losses.forward_kl),
}
UNPAIRED |= {"bco of the batch": losses.batch_delta(losses.bco)}
WITHOUT_REFERENCE = {"sft", "simpo", "cpo", "cpo without sft", "orpo", "alphapo"} | {
    "alphapo downwards",
    "reference_free",
}
SEPARABLE = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "sft"}
OF_THE_BATCH = {"bco_pair of the batch", "bco of the batch"}  # an infinite shift separates nothing
COUPLED = {name for name, loss in {**PAIRED, **UNPAIRED}.items() if marks.is_coupled(loss)}
# Past their exponent's limit, or the square's, these are other functions in another dtype.
CONTINUED = {"ipo", "sppo_hard", "cal_dpo", "chi_po", "chi_po clipped", "discopop"} | {
    name for name in PAIRED if "forward_kl" in name or "alpha" in name or "discopop" in name
}


def edges(dtype):
    limits = jnp.finfo(dtype)
    finite = [0.0, -float(limits.tiny), -1e3, float(limits.min), float(limits.max)]
    return np.array([*finite, -np.inf])


def paired_grid(dtype):
    """Policy and reference, chosen and rejected, at every combination of edges. `(4, points)`."""
    return np.array(list(itertools.product(edges(dtype), repeat=4))).T


def unpaired_grid(dtype):
    """Policy, reference, `kl` of both, and the label. `(5, points)`."""
    kl = [(-1.0, -2.0), (-np.inf, -1.0), (-1.0, -np.inf)]
    rows = itertools.product(itertools.product(edges(dtype), repeat=2), kl, [0.0, 1.0])
    return np.array([(*own, *mismatched, label) for own, mismatched, label in rows]).T


def two_rows(point, dtype):
    """The policy's and the reference's records of one point and an ordinary second row."""
    rows = jnp.stack([point, jnp.full_like(point, ORDINARY)], axis=-1)
    if len(point) == 5:
        label = jnp.stack([point[4] > 0, jnp.asarray(True)])
        l, r, kl, rkl = rows[:4].astype(dtype)  # noqa: E741
        return UnpairedLogProbs(l, label, kl=kl), UnpairedLogProbs(r, label, kl=rkl)
    lw, ll, rw, rl = rows.astype(dtype)
    lengths, halves = (jnp.asarray([3, 5]), jnp.asarray([4, 2])), jnp.full(2, 0.5, dtype)
    return PairLogProbs(lw, ll, *lengths, None, halves, halves), PairLogProbs(rw, rl, *lengths)


def on_grid(loss, grid, dtype, *, second=True):
    """By name what comes of each point: results, slopes and, by both roads, curvatures."""

    def at(point):
        policy, reference = two_rows(point, dtype)
        floats, rest = split(policy)

        def total(*floats):
            result = loss(join(floats, rest), reference)
            return result.loss.sum(), result

        gradient = jax.grad(total, argnums=tuple(range(len(floats))), has_aux=True)
        slopes, result = gradient(*floats)
        found = {"loss": result.loss, "result": result, "slopes": jnp.stack(slopes)}
        if second:
            # Directions without symmetry, in which curvatures do not cancel.
            along = [jnp.full_like(x, 1 + i) for i, x in enumerate(floats)]
            forward = jax.jvp(lambda *x: gradient(*x)[0], floats, tuple(along))[1]

            def weighed(*floats):
                return sum((a * x).sum() for a, x in zip(along, gradient(*floats)[0], strict=True))

            reverse = jax.grad(weighed, argnums=tuple(range(len(floats))))(*floats)
            found |= {"forward": jnp.stack(forward), "reverse": jnp.stack(reverse)}
        return found

    with jax.numpy_rank_promotion("raise"):
        return jax.tree.map(np.asarray, jax.vmap(at)(jnp.asarray(grid.T)))


def log_ratios(name, grid):
    """What the loss compares with what, infinite only if one of its arguments is."""
    clipped = np.where(np.isinf(grid), grid, np.clip(grid, -1e300, 1e300))
    with np.errstate(invalid="ignore"):
        if name in UNPAIRED:
            point = np.maximum(clipped[2] - clipped[3], 0) if name == "kto" else 0 * clipped[4]
            return clipped[0] - clipped[1], point
        if name in WITHOUT_REFERENCE:
            return clipped[0], clipped[1]
        return clipped[0] - clipped[2], clipped[1] - clipped[3]


def defined(name, grid):
    first, second = log_ratios(name, grid)
    sure = ~(np.isnan(first) | np.isnan(second))
    if name not in SEPARABLE:
        sure &= ~(np.isinf(first) & (first == second))
    if name in OF_THE_BATCH:
        sure &= np.isfinite(first) & np.isfinite(second)
    return sure


ROWS = [(name, paired_grid) for name in PAIRED] + [(name, unpaired_grid) for name in UNPAIRED]
everyone = pytest.mark.parametrize(("name", "grid_of"), ROWS, ids=[row[0] for row in ROWS])
# Those with arithmetic of their own for an edge; the others are slow for what they add.
QUICK = {
    "sigmoid",
    "exo_pair",
    "discopop",
    "orpo",
    "beta_dpo",
    "sppo_hard",
    "dpo forward_kl",
    "kto",
}
table = pytest.mark.parametrize(
    ("name", "grid_of"),
    [
        pytest.param(*row, id=row[0], marks=() if row[0] in QUICK else pytest.mark.slow)
        for row in ROWS
    ],
)


def assert_at(points, good, grid):
    bad = points & ~good
    assert not bad.any(), f"at {grid[:, bad].T[:5]}"


@functools.cache
def found(name, grid_of, of, dtype, infinity=np.inf, second=False):
    """`on_grid` for the edges of the dtype `of`, computed in `dtype`."""
    grid = grid_of(of)
    grid = np.where(np.isinf(grid), np.copysign(infinity, grid), grid)
    return on_grid({**PAIRED, **UNPAIRED}[name], grid, dtype, second=second)


@everyone
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_no_nan_and_finite_slopes(name, grid_of, dtype):
    grid, got = grid_of(dtype), found(name, grid_of, dtype, dtype)
    sure = defined(name, grid)
    assert_at(sure, ~np.isnan(got["loss"]).any(-1), grid)
    assert_at(sure, np.isfinite(got["slopes"]).all((-2, -1)), grid)
    if name not in COUPLED:
        assert (got["loss"][:, 1] == got["loss"][0, 1]).all()


@pytest.mark.slow
@table
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_finite_curvatures(name, grid_of, dtype):
    grid, got = grid_of(dtype), found(name, grid_of, dtype, dtype, second=True)
    sure = defined(name, grid)
    for order in ("forward", "reverse"):
        assert_at(sure, np.isfinite(got[order]).all((-2, -1)), grid)
    np.testing.assert_allclose(got["forward"][sure], got["reverse"][sure], rtol=1e-4, atol=1e-4)


@table
def test_values_of_finite_numbers(name, grid_of):
    """In float32 as in float64, where one formula holds in both and its numbers fit into both."""
    grid = grid_of(jnp.float32)
    size = abs(grid[:4]).sum(0)
    same = size < (20 if name in CONTINUED else 1.01 * float(jnp.finfo(jnp.float32).max))
    if name == "orpo":  # the odds of probability 1 are held at the dtype's precision
        same &= (grid[:2] < -1).all(0)
    got = found(name, grid_of, jnp.float32, jnp.float32)
    want = found(name, grid_of, jnp.float32, jnp.float64)
    for part in ("loss", "slopes"):
        assert_at(same, ~np.isnan(got[part]).any(tuple(range(1, got[part].ndim))), grid)
        ours, theirs = got[part][same], want[part][same]
        fits = abs(theirs) < 1e35
        np.testing.assert_allclose(ours[fits], theirs[fits], rtol=1e-5, atol=1e-5)


@table
def test_infinities_are_limits(name, grid_of):
    """The value at infinity is where those at 1e6 and 1e9 lead, and so are the slopes' signs."""
    grid = grid_of(jnp.float32)
    # Beside an exponential of 1e3 those of 1e6 and 1e9 would not be seen.
    small = abs(grid) < (20 if name in CONTINUED else 1e4)
    points = defined(name, grid) & np.isinf(grid).any(0) & (np.isinf(grid) | small).all(0)
    got = found(name, grid_of, jnp.float32, jnp.float32)
    near, far = (found(name, grid_of, jnp.float32, jnp.float32, size) for size in (1e6, 1e9))
    settled = np.isclose(near["loss"], far["loss"], rtol=1e-6, atol=1e-6)
    settled &= abs(far["loss"]) < 1e30  # where a square's tangent is flat
    limit = np.where(settled, far["loss"], np.copysign(np.inf, far["loss"]))
    np.testing.assert_allclose(got["loss"][points], limit[points], rtol=1e-5, atol=1e-5)
    signs = [np.where(abs(x) < 1e-9, 0, np.sign(x))[points] for x in (got["slopes"], far["slopes"])]
    np.testing.assert_array_equal(*signs)


@table
@pytest.mark.parametrize(
    "narrow", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)]
)
def test_narrow_is_float32(name, grid_of, narrow):
    got, want = (found(name, grid_of, narrow, dtype) for dtype in (narrow, jnp.float32))
    for ours, theirs in zip(*map(jax.tree.leaves, (got["result"], want["result"])), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs)
    assert got["slopes"].dtype == narrow
    # Out of its range a slope is infinite in float16.
    rounded = jnp.asarray(want["slopes"]).astype(narrow).astype(jnp.float32)
    precision = 2 * float(jnp.finfo(narrow).eps)
    np.testing.assert_allclose(
        got["slopes"].astype(np.float32), rounded, rtol=precision, atol=precision
    )


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, np.int64])
def test_numpy_scalars_out_of_range_are_refused(unchecked, number):
    for check in (checks.check_positive, checks.check_nonnegative):
        with pytest.raises(ValueError, match="`beta` must"):
            check(beta=number(-1))
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\)"):
        checks.check_range(low=0, below=1, beta=number(1))
