"""A feed-forward block with experts: a router chooses some of them for each token.

No token is dropped, whatever the router chooses, and none has an effect on another. Attention and
the norms around the block are in `layer.py`.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._jax.dtypes import at_least_float32
from ..._jax.grouped_dot import grouped_dot
from ..._jax.rounding import rounded
from ..._jax.routed_sum import routed_sum
from .basic_layers import ACTIVATIONS
from .config import Config

# Names of residuals of the backward pass, for a policy of `jax.checkpoint`: the outputs of the
# experts' products, and the experts of each token. If the latter were computed again, rounding
# could choose another expert in the backward pass than in the forward pass.
PRODUCTS, CHOSEN = "products of experts", "chosen experts"


class Router(eqx.Module):
    """The score of each expert for each token, in float32 or wider.

    **Arguments:**

    - `config`: gives the sizes, and whether there is a bias. `weight` has shape
        `(experts, width)`.
    - `key`: the random key of the initial weight.
    """

    weight: Float[Array, "experts width"]
    bias: Float[Array, " experts"] | None

    def __init__(self, config: Config, *, key: PRNGKeyArray):
        shape = (config.experts, config.width)
        self.weight = config.width**-0.5 * jax.random.normal(key, shape, jnp.float32)
        self.bias = jnp.zeros(config.experts, jnp.float32) if config.router_bias else None

    def __call__(self, x: Float[Array, "length width"]) -> Float[Array, "length experts"]:
        wide = x.astype(at_least_float32(x.dtype))
        # Many devices round the inputs of a product in float32 by default.
        highest = jax.lax.Precision.HIGHEST
        scores = jnp.matmul(wide, self.weight.astype(wide.dtype).T, precision=highest)
        if self.bias is None:
            return scores
        return scores + jnp.broadcast_to(self.bias.astype(wide.dtype), scores.shape)


class ExpertLinear(eqx.Module):
    """An affine map for each expert, in the dtype of its input.

    **Arguments:**

    - `experts`: the number of experts.
    - `out`: the size of the output. `weight` has shape `(experts, out, width)` and is normal.
    - `width`: the size of the input.
    - `bias`: whether to add a bias, of shape `(experts, out)`, zero at first.
    - `scale`: the standard deviation of the initial weight.
    - `key`: the random key of the initial weight.
    """

    weight: Float[Array, "experts out in"]
    bias: Float[Array, "experts out"] | None

    def __init__(
        self, experts: int, out: int, width: int, *, bias: bool, scale: float, key: PRNGKeyArray
    ):
        self.weight = scale * jax.random.normal(key, (experts, out, width), jnp.float32)
        self.bias = jnp.zeros((experts, out), jnp.float32) if bias else None

    def __call__(
        self, x: Float[Array, "rows in"], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows out"]:
        y = rounded(grouped_dot(x, self.weight.astype(x.dtype), expert))
        return y if self.bias is None else y + self.bias.astype(x.dtype)[expert]


class RoutedFeedForward(eqx.Module):
    """A weighted sum of the chosen experts, each `down(activation(gate(x)) * up(x))`.

    **Arguments:**

    - `config`: gives the sizes, the activation, the biases, and how experts are chosen. The weights
        of `gate` and `up` have shape `(experts, expert_width, width)`, and `down` has
        `(experts, width, expert_width)`.
    - `key`: the random key of the initial weights.
    """

    router: Router
    gate: ExpertLinear
    up: ExpertLinear
    down: ExpertLinear

    def __init__(self, config: Config, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        count, width, inner = config.experts, config.width, config.expert_width
        into = {"bias": config.feed_forward_bias, "scale": width**-0.5}
        self.router = Router(config, key=keys[0])
        self.gate = ExpertLinear(count, inner, width, key=keys[1], **into)
        self.up = ExpertLinear(count, inner, width, key=keys[2], **into)
        back = {"bias": config.feed_forward_bias, "scale": (2 * config.layers * inner) ** -0.5}
        self.down = ExpertLinear(count, width, inner, key=keys[3], **back)

    def __call__(
        self, x: Float[Array, "length width"], *, config: Config
    ) -> Float[Array, "length width"]:
        chosen, weights = route(self.scores(x), config)
        own = functools.partial(run_experts, config=config)
        return rounded(routed_sum(own, x, chosen, weights, (self.gate, self.up, self.down)))

    def scores(self, x: Float[Array, "length width"]) -> Float[Array, "length experts"]:
        """The scores of the router, of which an adapter computes in float32, too."""
        return self.router(x.astype(at_least_float32(x.dtype)))


def run_experts(
    x: Float[Array, "rows width"],
    expert: Int[Array, " rows"],
    experts: tuple[Any, Any, Any],
    *,
    config: Config,
) -> Float[Array, "rows width"]:
    """Each row through its expert, `down(activation(gate(x)) * up(x))`.

    Each of the three layers may have an adapter or a quantised weight.
    """
    gate, up = (checkpoint_name(part(x, expert), PRODUCTS) for part in experts[:2])
    return checkpoint_name(experts[2](gated(gate, up, config), expert), PRODUCTS)


def route(
    scores: Float[Array, "length experts"], config: Config
) -> tuple[Int[Array, "length chosen"], Float[Array, "length chosen"]]:
    """The experts of each token with the highest scores, and their weights.

    The weights are a softmax over all experts, or over the chosen ones if
    `config.normalised_routes`.
    """
    # Not `top_k`: XLA does not partition it on CPUs, and gathers the scores of all rows.
    order = jnp.argsort(jax.lax.stop_gradient(scores), axis=-1, stable=True, descending=True)
    chosen = checkpoint_name(order[:, : config.experts_per_token].astype(jnp.int32), CHOSEN)
    best = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.normalised_routes:
        return chosen, jax.nn.softmax(best, axis=-1)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return chosen, jnp.exp(best - jnp.broadcast_to(total, best.shape))


def gated(
    gate: Float[Array, "rows inner"], up: Float[Array, "rows inner"], config: Config
) -> Float[Array, "rows inner"]:
    """The activation of `gate` times `up`, perhaps both clipped."""
    limit = config.swiglu_limit
    if limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(config.swiglu_alpha * gate)
