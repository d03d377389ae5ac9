"""How evenly the routers of a policy use its experts: scores, losses and loads.

A user adds the losses to an objective of their own; no step here does so.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from ..._arrays.layout import Layout
from ..._arrays.packed import PackedLayout
from ..._arrays.tokens import as_ids
from .experts import RoutedFeedForward
from .layer import Layer
from .transformer import Transformer


def router_scores(
    policy: Transformer,
    ids: Integer[Array | np.ndarray, " length"],
    layout: Layout | PackedLayout | None = None,
) -> Float[Array, "layers length experts"]:
    """The score of each expert for each token in each layer with experts, before the softmax.

    ```python
    scores = jax.vmap(lambda ids: models.router_scores(policy, ids))(ids)
    ```

    **Arguments:**

    - `policy`: a policy with experts.
    - `ids`: token ids, integers of any dtype. Shape `(length,)`; `jax.vmap` it over a batch.
    - `layout`: how the row is made (default: one sequence).

    **Raises:**

    `ValueError` if `policy` has no experts, or as `Transformer.hidden` does.
    """
    config = policy.config
    if not config.experts:
        raise ValueError(
            "`policy` must have experts; its `config.experts` is 0, so that it has no routers."
        )
    layout = Layout(jnp.asarray(ids.size), ids.size, ()) if layout is None else layout

    def scores(layer: Layer, x: Array) -> Array | None:
        block = layer.feed_forward
        return block.scores(x) if isinstance(block, RoutedFeedForward) else None

    return policy.run_row(as_ids(ids), layout, observe=scores)[1].attention


def load_balancing_loss(
    scores: Float[Array, "*leading experts"],
    mask: Bool[Array | np.ndarray, "*mask"],
    *,
    experts_per_token: int,
) -> Float[Array, ""]:
    r"""The auxiliary loss that is least if all experts are used alike.

    $E \sum_e f_e p_e$ over the $E$ experts, where $f_e$ is the number of choices of expert $e$ for
    each token, and $p_e$ its mean weight in a softmax over all experts. Both are means over all
    layers and all tokens that count. It is `experts_per_token` if all experts are used alike.

    **Arguments:**

    - `scores`: the scores of the routers, with any leading axes.
    - `mask`: which of them count. It is broadcast to the leading axes of `scores`.
    - `experts_per_token`: the number of experts that the router chooses for a token.

    ??? cite

        Fedus et al., *Switch Transformers*, 2021 (arXiv 2101.03961), equations 4 to 6, for several
        choices as in `transformers`.
    """
    load = expert_load(scores, mask, experts_per_token=experts_per_token)
    weights = _mean(jax.nn.softmax(scores, axis=-1), mask)
    return scores.shape[-1] * experts_per_token * jnp.dot(load, weights)


def router_z_loss(
    scores: Float[Array, "*leading experts"], mask: Bool[Array | np.ndarray, "*mask"]
) -> Float[Array, ""]:
    """The mean square of the logarithm of the routers' softmax normalisers.

    It keeps scores small. The arguments are as in `load_balancing_loss`.

    ??? cite

        Zoph et al., *ST-MoE*, 2022 (arXiv 2202.08906), equation 5.
    """
    return _mean(jax.nn.logsumexp(scores, axis=-1, keepdims=True) ** 2, mask)[0]


def expert_load(
    scores: Float[Array, "*leading experts"],
    mask: Bool[Array | np.ndarray, "*mask"],
    *,
    experts_per_token: int,
) -> Float[Array, " experts"]:
    """The share of all choices that each expert gets; the shares sum to 1.

    The arguments are as in `load_balancing_loss`. No gradient flows.
    """
    chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), experts_per_token)[1]
    is_chosen = jax.nn.one_hot(chosen, scores.shape[-1], dtype=scores.dtype).sum(axis=-2)
    return _mean(is_chosen, mask) / experts_per_token


def _mean(
    values: Float[Array, "*leading width"], mask: Bool[Array | np.ndarray, "*mask"]
) -> Float[Array, " width"]:
    """The mean over the leading axes where the mask is true."""
    counts = jnp.broadcast_to(mask, values.shape[:-1])
    kept = jnp.where(counts[..., None], values, jnp.zeros_like(values))
    return kept.reshape(-1, values.shape[-1]).sum(axis=0) / counts.sum().astype(values.dtype)
