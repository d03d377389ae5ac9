"""Gradients and training steps: a score, a loss and an Optax optimiser composed into one function.

Nothing is jitted and no state is kept: arguments and results are pytrees. `passes.py` computes the
gradient, in one or two passes over the microbatches.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float, PyTree

from .._jax.dtypes import in_dtypes_of, in_float32_at_least
from .._jax.keys import Keys
from .._jax.mapped_axes import AxisName
from .._jax.partitioning import beside_sweeps
from .._jax.paths import leaf_name
from .._scoring.score import score_pairs
from ..protocols import Gradient, Loss, MetricsFunction, Score, Step
from .extra_args import extra_args
from .metrics import default_metrics
from .norms import GroupOf, group_norms
from .passes import Setup, averaged_metrics, check_setup, gradient, pose


def make_grad(
    loss: Loss,
    *,
    score: Score = score_pairs,
    trainable: PyTree = eqx.is_inexact_array,
    microbatches: int = 1,
    axis_name: AxisName | None = None,
    compute_dtype: DTypeLike | None = None,
    reference_of: Callable[[Any], Any] | None = None,
    metrics: MetricsFunction = default_metrics,
) -> Gradient:
    r"""The gradient of the weighted mean loss, $\sum_i w_i \ell_i / \sum_i w_i$, and metrics.

    ```python
    gradients, metrics = make_grad(loss)(policy, batch, reference, key=key)
    ```

    **Arguments:**

    - `loss`: a function of the form `loss(policy, reference, *, ...) -> PairLoss`. Bind its
        hyper-parameters by `functools.partial`, and pass per-pair ones as `batch.per_pair`.
    - `score`: a function of the form `(policy, batch, *, key) -> log-probabilities`.
    - `trainable`: an Equinox filter specification of the arrays to differentiate.
    - `microbatches`: the number of parts into which the batch is split; they run one after the
        other, to save memory. The result is the same up to rounding. A loss that couples pairs
        then runs the forward pass twice.
    - `axis_name`: the mapped axis, or axes, of `pmap` or `shard_map` over which the pairs are
        split. Sums run over all devices of the axis, and every device gets the whole gradient.
    - `compute_dtype`: the dtype to which the policy and the reference are cast for the forward
        pass. Gradients stay in the parameters' dtype, float32 at least. Complex arrays stay
        complex, complex64 at least. The first loss of DPO is log 2 in every dtype, because a policy
        with narrow arrays is checkpointed: its forward pass is then compiled alike for policy and
        reference. Wrap the call of a policy that casts inside itself in `eqx.filter_checkpoint`.
    - `reference_of`: makes the reference from the policy, as `models.without_lora` does. It is
        traced once more, to check that no array of the reference depends on trained arrays.
    - `metrics`: a function of the form
        `(policy_log_probs, reference_log_probs, pair_loss) -> dict`, see `default_metrics`.

    **Returns:**

    A pure function, not jitted, of

    - `policy`: any callable pytree, see `score_pairs`;
    - `batch`: a `PreferenceBatch`, or any batch that `score` takes;
    - `reference`: a policy that does not learn, run in inference mode in the same dtype; or `None`
        if it is precomputed (`batch.reference`), a view (`reference_of`) or not needed;
    - `key`: for dropout, one key, or one key for each pair of the global batch, so that any
        microbatches and devices draw the same masks. The reference gets no key. With keys of the
        kinds `rbg` and `unsafe_rbg` the masks are equally good, but depend on microbatches and
        devices: under `vmap` JAX draws the numbers of a whole batch from its first key.

    It returns a pytree like `policy`, with `None` for leaves that are not trainable, and a dict of
    scalars: the means of `metrics`, and `grad_norm`. An optimiser may subtract the gradient as it
    is: for a complex parameter it is $\partial/\partial x + i\,\partial/\partial y$, the
    conjugate of JAX's. A batch whose weights sum to 0 has loss 0 and gradient 0.

    **Raises:**

    `ValueError` at trace time if a reference is missing, given twice or moves with the policy, or
    if `microbatches` does not divide the pairs. It is also raised if `loss` has a bound array
    with axes while pairs are split, if `trainable` selects nothing or arrays that cannot be
    differentiated, or if `axis_name` is an axis of `vmap`.

    ??? info "Precision"

        If the policy computes in less than float32, its forward pass is computed once more in the
        backward pass (`jax.checkpoint`). Otherwise XLA would keep excess precision in other
        intermediate results of the differentiated forward pass than of the reference's forward
        pass. Log-ratios that should be 0 were then tenths of a nat on a GPU.

        A policy with a true attribute `rounds_alike`, such as `models.Transformer`, does without,
        and its step takes about a sixth less time on a GPU. All intermediate results that it keeps
        for the backward pass must then go through `jax.lax.optimization_barrier`.
    """
    setup = Setup(
        loss, score, trainable, microbatches, axis_name, compute_dtype, reference_of, metrics
    )
    check_setup(setup)

    def grad(
        policy: PyTree,
        batch: Any,
        reference: PyTree | None = None,
        *,
        key: Keys | None = None,
    ) -> tuple[PyTree, dict[str, Float[Array, ""]]]:
        problem = pose(setup, policy, batch, reference, key)
        gradients, pairs, losses = gradient(problem, problem.stored)
        return gradients, averaged_metrics(problem, gradients, pairs, losses)

    return beside_sweeps(grad)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    score: Score = score_pairs,
    trainable: PyTree = eqx.is_inexact_array,
    microbatches: int = 1,
    axis_name: AxisName | None = None,
    compute_dtype: DTypeLike | None = None,
    reference_of: Callable[[Any], Any] | None = None,
    metrics: MetricsFunction = default_metrics,
    update_fraction: bool = False,
    group_of: GroupOf | None = None,
) -> Step:
    """One training step: `make_grad`, and the optimiser's update of the trainable arrays.

    ```python
    step = eqx.filter_jit(make_step(loss, optimizer))
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    policy, opt_state, metrics = step(policy, opt_state, batch, reference, key=key)
    ```

    **Arguments:**

    - `optimizer`: an Optax transformation. Its arithmetic is in float32 at least; its state and
        the parameters keep their dtypes. So new bfloat16 or float16 parameters are rounded, and an
        update below half of a parameter's spacing (1/500 of a bfloat16 parameter) is lost. At the
        learning rates of preference training that is nearly every update. Keep trained parameters
        in float32 and pass `compute_dtype=jnp.bfloat16`, or wrap the optimiser in
        `master_weights`. (`optax.inject_hyperparams` makes hyper-parameters in the parameters'
        dtype, and a `b2` of 0.999 is 1 in bfloat16: pass it `hyperparam_dtype=jnp.float32`.)
        An optimiser that takes extra arguments gets `value`, the global weighted mean loss;
        `grad`; and `value_fn`, the objective as a function of the trained parameters, exact over
        microbatches and devices, with the same keys. So line searches work, and Sophia, which
        calls it `obj_fn`. If a transformation in a chain refuses unknown arguments, as
        Sharpness-Aware Minimization (SAM) does, hide them from it:
        `optax.chain(clip, optax.GradientTransformation(*sam))`.
    - `update_fraction`: adds a metric of that name, the fraction of the trained numbers that this
        step changed, as stored in the parameters' own dtype. A fraction near 0 means that updates
        are rounded away.
    - `group_of`: adds the metrics `grad_norm/GROUP` and `update_norm/GROUP`, the norms of the
        gradients and of the optimiser's updates in each group of parameters. It is a function from
        the name of a parameter to its group, such as `dpx.parameter_group`; see `group_norms`.
    - All other arguments are as in `make_grad`.

    **Returns:**

    A pure function, not jitted, of `(policy, opt_state, batch, reference=None, *, key=None)`. Wrap
    it in `eqx.filter_jit`, `lax.scan`, `shard_map`, `pmap` or `vmap`.

    **Raises:**

    `ValueError` at trace time, as `make_grad`, and if `opt_state` was made for other leaves than
    `trainable` selects.
    """
    setup = Setup(
        loss, score, trainable, microbatches, axis_name, compute_dtype, reference_of, metrics
    )
    check_setup(setup)

    def step(
        policy: PyTree,
        opt_state: PyTree,
        batch: Any,
        reference: PyTree | None = None,
        *,
        key: Keys | None = None,
    ) -> tuple[PyTree, PyTree, dict[str, Float[Array, ""]]]:
        problem = pose(setup, policy, batch, reference, key)
        params = problem.stored
        _check_opt_state(optimizer, opt_state, params)
        gradients, pairs, losses = gradient(problem, params)
        means = averaged_metrics(problem, gradients, pairs, losses)
        extra = extra_args(optimizer, problem, gradients, pairs, losses)
        # Optax computes in the parameters' dtype, and half precision would lose small updates.
        wide_params, wide_state = in_float32_at_least((params, opt_state))
        updates, new_state = optimizer.update(gradients, wide_state, wide_params, **extra)
        new_params = optax.apply_updates(wide_params, updates)
        new_params, new_state = in_dtypes_of((new_params, new_state), (params, opt_state))
        if update_fraction:
            means = {**means, "update_fraction": _changed_fraction(new_params, params)}
        if group_of is not None:
            means = {**means, **_norms(gradients, updates, group_of)}
        return eqx.combine(new_params, problem.frozen), new_state, means

    return beside_sweeps(step)


def _norms(gradients: PyTree, updates: PyTree, group_of: GroupOf) -> dict[str, Float[Array, ""]]:
    return {
        f"{kind}/{group}": norm
        for kind, tree in (("grad_norm", gradients), ("update_norm", updates))
        for group, norm in group_norms(tree, group_of=group_of).items()
    }


def _changed_fraction(new: PyTree, old: PyTree) -> Float[Array, ""]:
    """The fraction of all numbers in `new` that differ from their counterparts in `old`."""

    def count(x, y):
        # Counted by rows, because a count over all layers of a large model overflows an int32.
        return jnp.atleast_1d(x != y).sum(-1).astype(jnp.zeros(()).dtype).sum()

    counts = jax.tree.leaves(jax.tree.map(count, new, old))
    return jnp.stack(counts).sum() / max(sum(x.size for x in jax.tree.leaves(old)), 1)


def _check_opt_state(
    optimizer: optax.GradientTransformation, opt_state: PyTree, params: PyTree
) -> None:
    """Raises if the arrays of `opt_state` differ from those of `optimizer.init(params)`."""
    want, got = map(_shapes, (eqx.filter_eval_shape(optimizer.init, params), opt_state))
    if want != got:
        differing = next(path for path in {**want, **got} if want.get(path) != got.get(path))
        expected, found = want.get(differing, "none"), got.get(differing, "none")
        raise ValueError(
            "`opt_state` must be the optimiser's state for the arrays that `trainable` selects; "
            f"`{differing}` should have shape {expected} and has {found}. "
            "Make it by `optimizer.init(eqx.filter(policy, trainable))`."
        )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {
        leaf_name(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
