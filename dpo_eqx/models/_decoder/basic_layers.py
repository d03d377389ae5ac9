"""The basic layers of a decoder that hold parameters: linear layers, norms, embeddings.

Results have the dtype of the activations, whatever the parameters' dtype; nothing here mixes
tokens.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._jax.dtypes import at_least_float32
from ..._jax.rounding import rounded
from .config import Config

# The constants of xIELU in checkpoints.
XIELU_BETA, XIELU_EPS = 0.5, -1e-6


class Linear(eqx.Module):
    """An affine map of the last axis, `x @ weight.T + bias`, in the dtype of `x`.

    **Arguments:**

    - `out`: the size of the output. `weight` has shape `(out, width)` and is normal.
    - `width`: the size of the input.
    - `bias`: whether to add a bias, of shape `(out,)`, zero at first.
    - `scale`: the standard deviation of the initial weight.
    - `key`: the random key of the initial weight.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"] | None

    def __init__(self, out: int, width: int, *, bias: bool, scale: float, key: PRNGKeyArray):
        self.weight = scale * jax.random.normal(key, (out, width), jnp.float32)
        self.bias = jnp.zeros(out, jnp.float32) if bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        y = rounded(x @ self.weight.astype(x.dtype).T)
        return y if self.bias is None else y + jnp.broadcast_to(self.bias.astype(x.dtype), y.shape)


class Bias(eqx.Module):
    """What a tied unembedding has of its own: a bias of the logits, zero at first.

    **Arguments:**

    - `out`: the size of the vocabulary. `bias` has shape `(out,)`.
    """

    bias: Float[Array, " out"]

    def __init__(self, out: int):
        self.bias = jnp.zeros(out, jnp.float32)


class Norm(eqx.Module):
    """Root-mean-square or layer normalisation of the last axis, computed in float32 or wider.

    **Arguments:**

    - `shape`: the size of the normalised axis, perhaps after other axes with weights of their own.
        `weight`, and `bias` in layer normalisation, have this shape.
    - `config`: its `norm` chooses the kind, `norm_eps` is added to the mean square, and
        `norm_offset` to the weight. `norm_weight` and `norm_bias` say whether there are parameters.
    - `bias`: whether it has a bias if other norms have one.
    """

    weight: Float[Array, "*axes width"] | None
    bias: Float[Array, "*axes width"] | None
    centred: bool = eqx.field(static=True)
    eps: float = eqx.field(static=True)
    offset: float = eqx.field(static=True)

    def __init__(self, shape: int | tuple[int, ...], config: Config, *, bias: bool = True):
        self.centred = config.norm == "layer"
        has_bias = bias and self.centred and config.norm_bias and config.norm_weight
        weight = jnp.full(shape, 1 - config.norm_offset, jnp.float32)
        self.weight = weight if config.norm_weight else None
        self.bias = jnp.zeros(shape, jnp.float32) if has_bias else None
        self.eps = config.norm_eps
        self.offset = config.norm_offset

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        # A mean of squares would overflow in float16 and lose digits in bfloat16.
        wide = x.astype(at_least_float32(x.dtype))
        if self.centred:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        if self.weight is not None:
            weight = self.weight.astype(wide.dtype) + self.offset
            wide = wide * jnp.broadcast_to(weight, wide.shape)
        if self.bias is not None:
            wide = wide + jnp.broadcast_to(self.bias.astype(wide.dtype), wide.shape)
        return wide.astype(x.dtype)


class Embedding(eqx.Module):
    """A table of vectors by id.

    **Arguments:**

    - `count`: the number of ids.
    - `width`: the size of a vector. `weight` has shape `(count, width)` and is normal, with a
        standard deviation of 0.02.
    - `key`: the random key of the initial table.
    """

    weight: Float[Array, "count width"]

    def __init__(self, count: int, width: int, *, key: PRNGKeyArray):
        self.weight = 0.02 * jax.random.normal(key, (count, width), jnp.float32)

    def __call__(self, ids: Int[Array, " length"]) -> Float[Array, "length width"]:
        return self.weight[ids]


class XIELU(eqx.Module):
    r"""An activation with two trained scalars, quadratic above zero and exponential below.

    With $\beta = 0.5$: $\alpha_p x^2 + \beta x$ if $x > 0$, else
    $\alpha_n (e^x - 1 - x) + \beta x$, where $\alpha_p$ is the softplus of `alpha_p`, and
    $\alpha_n$ is $\beta$ plus the softplus of `alpha_n`.

    ??? cite

        Huang and Schlag, *Deriving Activation Functions Using Integration*, 2024 (arXiv
        2411.13010).
    """

    alpha_p: Float[Array, " 1"]
    alpha_n: Float[Array, " 1"]

    def __init__(self):
        # Both slopes begin at 0.8.
        self.alpha_p = jnp.log(jnp.expm1(jnp.full(1, 0.8, jnp.float32)))
        self.alpha_n = jnp.log(jnp.expm1(jnp.full(1, 0.8 - XIELU_BETA, jnp.float32)))

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        wide = x.astype(at_least_float32(x.dtype))
        above = jnp.maximum(wide, 0)
        slope_above = jax.nn.softplus(self.alpha_p.astype(wide.dtype))[0]
        slope_below = XIELU_BETA + jax.nn.softplus(self.alpha_n.astype(wide.dtype))[0]
        # As the published code, which takes the exponential of at most -1e-6.
        bent = jnp.expm1(jnp.minimum(wide, XIELU_EPS)) - wide
        y = jnp.where(wide > 0, slope_above * above**2, slope_below * bent) + XIELU_BETA * wide
        return y.astype(x.dtype)


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """`x` times a constant, in the dtype of `x`."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def dropout(
    x: Float[Array, "*shape"], probability: float, key: PRNGKeyArray | None
) -> Float[Array, "*shape"]:
    """Dropout: zeroes each number with this probability and scales up the rest.

    Without a key, `x` stays as it is.
    """
    if key is None or probability == 0:
        return x
    is_kept = jax.random.bernoulli(key, 1 - probability, x.shape)
    # Scaled up, so that the expected value stays the same.
    return jnp.where(is_kept, x / jnp.asarray(1 - probability, x.dtype), jnp.zeros_like(x))


def _relu_squared(x: Array) -> Array:
    return jax.nn.relu(x) ** 2


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _clipped_gelu(x: Array) -> Array:
    return jnp.clip(_gelu(x), -10, 10)


def _laplace(x: Array) -> Array:
    # The rounded mean and standard deviation of the published code.
    return jax.scipy.stats.norm.cdf((x - 0.707107) / 0.282095)


def _leaky_relu(x: Array) -> Array:
    return jax.nn.leaky_relu(x, 0.01)


def _root_of_softplus(x: Array) -> Array:
    return jnp.sqrt(jax.nn.softplus(x))


def _identity(x: Array) -> Array:
    return x


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": _relu_squared,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "quick_gelu": _quick_gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_10": _clipped_gelu,
    "hardswish": jax.nn.hard_swish,
    "laplace": _laplace,
    "leaky_relu": _leaky_relu,
    "linear": _identity,
    "mish": jax.nn.mish,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": _root_of_softplus,
    "tanh": jnp.tanh,
}
"""The activations without parameters, by the names of `transformers`."""
