"""Evaluation: the metrics of a step, without the step."""

from collections.abc import Callable
from typing import Any

from jaxtyping import DTypeLike, PyTree

from .._arrays.metrics import Metrics
from .._jax.mapped_axes import AxisName, total, vary
from .._scoring.score import score_pairs
from ..protocols import Evaluate, Loss, MetricsFunction, Score
from .metrics import default_metrics, weighted_sums
from .objective import Scored, check_is_loss, loss_of, pair_weights
from .reference import choose_reference, run_inference, run_reference


def make_eval(
    loss: Loss,
    *,
    score: Score = score_pairs,
    axis_name: AxisName | None = None,
    compute_dtype: DTypeLike | None = None,
    reference_of: Callable[[Any], Any] | None = None,
    metrics: MetricsFunction = default_metrics,
) -> Evaluate:
    """The metrics of a policy on a batch, as sums that add up over batches.

    ```python
    evaluate = eqx.filter_jit(make_eval(loss))
    means = sum(evaluate(policy, batch, reference) for batch in batches).mean()
    ```

    **Arguments:**

    As in `make_grad`. A loss that couples pairs couples the pairs of one call.

    **Returns:**

    A pure function, not jitted, of `(policy, batch, reference=None)`. It runs policy and reference
    in inference mode and returns `Metrics`. Their `+` joins batches exactly, even with ragged
    batches and pairs of weight 0. Their `mean()` is the dict that a step returns, without
    `grad_norm`.

    **Raises:**

    `ValueError` at trace time, as `make_grad`.
    """

    check_is_loss(loss)

    def evaluate(policy: PyTree, batch: Any, reference: PyTree | None = None) -> Metrics:
        reference = choose_reference(policy, batch, reference, reference_of)
        batch = vary(batch, axis_name)

        options = {"score": score, "compute_dtype": compute_dtype}
        reference_log_probs = batch.reference
        if reference is not None:
            reference_log_probs = run_reference(reference, batch, **options)
        log_probs = run_inference(policy, batch, **options)
        scored = Scored(log_probs, reference_log_probs, batch.per_pair, pair_weights(batch))
        values = metrics(scored.policy, reference_log_probs, loss_of(loss, scored, axis_name))
        return total(weighted_sums(values, scored.weight), axis_name)

    return evaluate
