r"""The gradient of the weighted mean loss, in one pass over the microbatches or in two.

With the objective $L$ and the log-probabilities $\log\pi_i(\theta)$ of the pairs,

$$\frac{dL}{d\theta} = \sum_i \frac{\partial L}{\partial \log\pi_i} \frac{d \log\pi_i}{d\theta}.$$

The first factor is the slope, computed by the loss; the pullback of the score applies the second.
For most losses the slope of a pair depends on that pair alone, so each microbatch goes through
score, loss and pullback at once (`_one_pass`). A loss that couples pairs needs the
log-probabilities of all pairs before it can compute any slope. So all microbatches are scored
first, and then each is scored again and pulled back (`_two_passes`). Optimisers are not here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float, PyTree

from .._arrays.packed import rows_of
from .._jax.dtypes import in_dtype, in_dtypes_of, in_float32_at_least, is_narrow
from .._jax.keys import Keys, own_keys
from .._jax.mapped_axes import AxisName, total, vary
from .._jax.microbatches import accumulate, check_divides
from .._jax.paths import leaf_name
from .._scoring.policy_checks import where_arrays_are
from ..losses._marks import is_coupled
from ..protocols import Loss, MetricsFunction, Score
from .metrics import weighted_sums
from .objective import (
    Scored,
    check_is_loss,
    check_no_bound_axis,
    loss_and_slopes,
    loss_of,
    mean_loss,
    pair_weights,
)
from .reference import choose_reference, run_reference


class Setup(NamedTuple):
    """The arguments of `make_grad`, in their order."""

    loss: Loss
    score: Score
    trainable: PyTree
    microbatches: int
    axis_name: AxisName | None
    compute_dtype: DTypeLike | None
    reference_of: Callable[[Any], Any] | None
    metrics: MetricsFunction


def check_setup(setup: Setup) -> None:
    """Raises `ValueError` if the loss is not a function, or holds an array to split by pairs."""
    check_is_loss(setup.loss)
    if setup.microbatches != 1 or setup.axis_name is not None:
        check_no_bound_axis(setup.loss)


class Rows(NamedTuple):
    """The data that is split into microbatches: pairs, keys, and a precomputed reference."""

    batch: Any
    keys: Keys | None
    reference: Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything that stays fixed while the gradient is computed for one batch.

    **Arguments:**

    - `setup`: the arguments of `make_grad`.
    - `stored`: the trainable arrays, in the dtypes in which the policy holds them.
    - `frozen`: the rest of the policy.
    - `reference`: the policy to run as reference; `None` if it is precomputed or not needed.
    - `rows`: the pairs on this device.
    - `weight_sum`: the sum of the weights of the global batch.
    """

    setup: Setup
    stored: PyTree
    frozen: PyTree
    reference: PyTree | None
    rows: Rows
    weight_sum: Float[Array, ""]


def pose(
    setup: Setup, policy: PyTree, batch: Any, reference: PyTree | None, key: Keys | None
) -> Problem:
    """The problem that one call of a gradient solves.

    **Raises:**

    `ValueError` if the arguments do not fit each other, as in `make_grad`.
    """
    axis_name = setup.axis_name
    check_divides(setup.microbatches, rows_of(batch))
    stored, frozen = split_trainable(policy, setup.trainable)
    reference = choose_reference(policy, batch, reference, setup.reference_of, (stored, frozen))
    keys = own_keys(key, rows_of(batch), axis_name)
    rows = Rows(*vary((batch, keys, batch.reference), axis_name))
    weight_sum = total(pair_weights(rows.batch).sum(), axis_name)
    return Problem(setup, stored, frozen, reference, rows, weight_sum)


def gradient(problem: Problem, params: PyTree) -> tuple[PyTree, Scored, Any]:
    """The gradient at `params`, the arguments of the loss for each pair, and its result.

    `params` is a pytree like `problem.stored`, in any floating dtypes. The gradient is in float32
    or wider, and is the sum over all devices.
    """
    setup = problem.setup
    # Cast and marked outside the differentiated function, so that JAX does not sum over devices:
    # `total` below does.
    params = vary(in_float32_at_least(params), setup.axis_name)
    two_passes = is_coupled(setup.loss) and setup.microbatches > 1
    gradients, pairs, losses = (_two_passes if two_passes else _one_pass)(problem, params)
    # JAX's gradient with respect to a complex number is the conjugate of the direction of ascent.
    return total(jax.tree.map(jnp.conj, gradients), setup.axis_name), pairs, losses


def averaged_metrics(
    problem: Problem, gradients: PyTree, pairs: Scored, losses: Any
) -> dict[str, Float[Array, ""]]:
    """The means of the metrics over the global batch, and the norm of the gradient."""
    values = problem.setup.metrics(pairs.policy, pairs.reference, losses)
    sums = total(weighted_sums(values, pairs.weight), problem.setup.axis_name)
    return {**sums.mean(), "grad_norm": optax.tree.norm(gradients)}


def objective_at(problem: Problem, params: PyTree) -> Float[Array, ""]:
    """The weighted mean loss at `params`, without its gradient."""
    setup = problem.setup
    pairs = _score_all(problem, vary(params, setup.axis_name))
    return mean_loss(pairs, loss_of(setup.loss, pairs, setup.axis_name), setup.axis_name)


def split_trainable(policy: PyTree, trainable: PyTree) -> tuple[PyTree, PyTree]:
    """The arrays of `policy` that `trainable` selects, and the rest of `policy`."""
    params, frozen = eqx.partition(policy, trainable)
    selected = jax.tree_util.tree_leaves_with_path(params)
    if not selected:
        raise ValueError(
            "`trainable` must select at least one array of the policy; got a filter that selects "
            f"none. {where_arrays_are(policy)}"
        )
    for path, leaf in selected:
        if not eqx.is_inexact_array(leaf):
            name = leaf_name(path)
            raise ValueError(
                "`trainable` must select floating-point arrays only, which can be differentiated; "
                f"it selects `{name}`, {leaf!r}."
            )
    _check_no_state(params)
    return params, frozen


def _check_no_state(params: PyTree) -> None:
    """Raises if the state of a layer, such as the running mean of BatchNorm, would be trained."""
    if holds(params, eqx.nn.State):
        raise ValueError(
            "`trainable` must not select an `eqx.nn.State`, which no gradient should change; got a "
            "policy that holds one. Hold it frozen, outside of the policy: `policy = dpx.adapt("
            "model, lambda model, ids, key: model(ids, jax.tree.map(jnp.copy, state))[0])`."
        )


def holds(tree: PyTree, kinds: type | tuple[type, ...]) -> bool:
    """Whether `tree` has a node of these classes that is not empty."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(node, kinds) and jax.tree.leaves(node) for node in nodes)


def _one_pass(problem: Problem, params: PyTree) -> tuple[PyTree, Scored, Any]:
    """Runs score, loss and pullback on one microbatch after the other."""
    setup = problem.setup

    def microbatch(rows: Rows):
        log_probs, pull = _pullback(problem, params, rows)
        pairs = _with_reference(problem, log_probs, rows)
        losses, slopes = loss_and_slopes(setup.loss, pairs, problem.weight_sum, setup.axis_name)
        return pull(slopes), (pairs, losses)

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradients, (pairs, losses) = accumulate(microbatch, problem.rows, setup.microbatches, zeros)
    return gradients, pairs, losses


def _two_passes(problem: Problem, params: PyTree) -> tuple[PyTree, Scored, Any]:
    """Scores all microbatches, runs the loss on all pairs, then pulls back each microbatch."""
    setup = problem.setup
    pairs = _score_all(problem, params)
    losses, slopes = loss_and_slopes(setup.loss, pairs, problem.weight_sum, setup.axis_name)

    def microbatch(rows_and_slopes: tuple[Rows, PyTree]):
        rows, slopes = rows_and_slopes
        # The same keys as in the first pass, so the same dropout masks.
        _, pull = _pullback(problem, params, rows)
        return pull(slopes), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradients, _ = accumulate(microbatch, (problem.rows, slopes), setup.microbatches, zeros)
    return gradients, pairs, losses


def _score_all(problem: Problem, params: PyTree) -> Scored:
    """The arguments of the loss for all pairs, computed one microbatch after the other."""

    def microbatch(rows: Rows):
        return None, _with_reference(problem, _run_policy(problem, params, rows), rows)

    return accumulate(microbatch, problem.rows, problem.setup.microbatches, None)[1]


def _run_policy(problem: Problem, params: PyTree, rows: Rows) -> Any:
    """The log-probabilities of the policy with the trainable arrays `params`."""
    params = in_dtypes_of(params, problem.stored)
    policy = in_dtype(eqx.combine(params, problem.frozen), problem.setup.compute_dtype)
    score = problem.setup.score
    if is_narrow(policy) and not getattr(policy, "rounds_alike", False):
        # Without a checkpoint, XLA would round the differentiated forward pass at other places than
        # the reference's forward pass.
        score = eqx.filter_checkpoint(score)
    return score(policy, rows.batch, key=rows.keys)


def _with_reference(problem: Problem, log_probs: Any, rows: Rows) -> Scored:
    """The policy's log-probabilities with the other arguments of the loss."""
    batch, reference = rows.batch, rows.reference
    if reference is None and problem.reference is not None:
        setup = problem.setup
        reference = run_reference(
            problem.reference, batch, score=setup.score, compute_dtype=setup.compute_dtype
        )
    return Scored(log_probs, reference, batch.per_pair, pair_weights(batch))


def _pullback(problem: Problem, params: PyTree, rows: Rows) -> tuple[Any, Callable]:
    """The log-probabilities at `params`, and the pullback of slopes of their floating arrays."""

    def floats_and_rest(params):
        return eqx.partition(_run_policy(problem, params, rows), eqx.is_inexact_array)

    floats, pull, rest = jax.vjp(floats_and_rest, params, has_aux=True)
    return eqx.combine(floats, rest), lambda slopes: pull(slopes)[0]
