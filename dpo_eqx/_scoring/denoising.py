"""The score of diffusion models: minus the squared error of the denoiser.

Models of text are scored in `score.py`. Noise and time are drawn by whoever makes the batch.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._arrays.denoising import DenoisingBatch
from .._arrays.log_probs import PairLogProbs
from .._jax.describe import described
from .._jax.dtypes import at_least_float32
from .._jax.keys import Keys, keys_per_pair
from .._jax.scalars import Number
from ..protocols import Score

# From a time to the factors of the image and of the noise.
Schedule = Callable[[Float[Array, ""]], tuple[Number, Number]]
Prediction = Literal["epsilon", "x0", "v", "flow"]


def denoising_score(
    schedule: Schedule,
    *,
    prediction: Prediction = "epsilon",
    omega: Callable[[Float[Array, ""]], Number] | None = None,
) -> Score[PairLogProbs]:
    r"""A score for diffusion models: minus the squared error of the denoiser, for Diffusion-DPO.

    $-\omega(t)\,\|y - f_\theta(x_t, t)\|^2$ with $x_t = \alpha_t x_0 + \sigma_t\epsilon$ takes the
    place of a log-probability, and `losses.dpo` is Diffusion-DPO, unchanged. The denoiser
    $f_\theta$ is the policy: it is called as `denoiser(noisy, time)` on one image.

    ```python
    score = denoising_score(lambda t: (jnp.cos(t), jnp.sin(t)))
    step = make_step(partial(losses.dpo, beta=500.0), optimizer, score=score)
    ```

    **Arguments:**

    - `schedule`: from a time to $(\alpha_t, \sigma_t)$, the factors of the image and of the noise.
    - `prediction`: the target $y$, which is what the denoiser predicts: `"epsilon"` is the noise
        $\epsilon$, `"x0"` is the image $x_0$, `"v"` is $\alpha_t\epsilon - \sigma_t x_0$, and
        `"flow"` is the velocity of flow matching, $\epsilon - x_0$.
    - `omega`: the weight $\omega(t)$ of a time (default: 1 at all times). The paper's error is that
        of the noise. It is the error of $x_0$ times $\alpha_t^2/\sigma_t^2$, and the error of $v$
        times $\alpha_t^2$ if $\alpha_t^2 + \sigma_t^2 = 1$.

    **Returns:**

    A score, `(denoiser, batch, *, key=None) -> PairLogProbs`, of a `DenoisingBatch`. The errors are
    summed over an image, in float32 at least. The lengths are the numbers of pixels. So
    `losses.sft` is the mean squared error on the chosen images, and
    `losses.length_normalized(losses.dpo)` takes means over pixels, as the authors' code does. With
    a key, the denoiser is called with `key=key`, another one for each image.

    **Raises:**

    `ValueError` if `prediction` is another word, or if the denoiser does not return an array of the
    shape of the image.

    ??? cite

        Wallace et al., *Diffusion Model Alignment Using Direct Preference Optimization*, 2023,
        equation 14 (arXiv 2311.12908). The `beta` of the loss is the paper's $\beta T$. In the
        authors' code it is `beta_dpo / 2`, with means over pixels. $v$: Salimans and Ho,
        *Progressive Distillation for Fast Sampling of Diffusion Models*, 2022 (arXiv 2202.00512).
    """
    if prediction not in get_args(Prediction):
        raise ValueError(
            f"`prediction` must be one of {', '.join(map(repr, get_args(Prediction)))}; "
            f"got {prediction!r}."
        )

    def score(policy: PyTree, batch: DenoisingBatch, *, key: Keys | None = None) -> PairLogProbs:
        def log_prob(image, noise, time, condition, key):
            alpha, sigma = schedule(time)
            target = _target(prediction, image, noise, alpha, sigma)
            noisy = alpha * image + sigma * noise
            error = _squared_error(policy, noisy, time, condition, key, target)
            return -error if omega is None else -omega(time) * error

        keys = keys_per_pair(key, batch.pairs)
        # One key for each image, as in `score_pairs`.
        split = None if keys is None else jax.vmap(jax.random.split, out_axes=1)(keys)
        other = batch.noise if batch.rejected_noise is None else batch.rejected_noise
        chosen, rejected = (
            jax.vmap(log_prob)(
                jnp.asarray(images),
                jnp.asarray(noise),
                jnp.asarray(batch.time),
                batch.condition,
                None if split is None else split[side],
            )
            for side, (images, noise) in enumerate(
                ((batch.chosen, batch.noise), (batch.rejected, other))
            )
        )
        pixels = jnp.full(chosen.shape, int(np.prod(batch.chosen.shape[1:])), jnp.int32)
        weight = None if batch.weight is None else jnp.asarray(batch.weight, chosen.dtype)
        return PairLogProbs(chosen, rejected, pixels, pixels, weight)

    return score


def _target(
    prediction: Prediction,
    image: Float[Array, "*image"],
    noise: Float[Array, "*image"],
    alpha: Number,
    sigma: Number,
) -> Float[Array, "*image"]:
    """What a perfect denoiser returns."""
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return image
    return alpha * noise - sigma * image if prediction == "v" else noise - image


def _squared_error(
    denoiser: Any,
    noisy: Float[Array, "*image"],
    time: Float[Array, ""],
    condition: PyTree,
    key: Keys | None,
    target: Float[Array, "*image"],
) -> Float[Array, ""]:
    """The squared error of one call of the denoiser, summed over the image."""
    given = (noisy, time) if condition is None else (noisy, time, condition)
    predicted = denoiser(*given) if key is None else denoiser(*given, key=key)
    if getattr(predicted, "shape", None) != target.shape:
        called = "denoiser(noisy, time" + (")" if condition is None else ", condition)")
        raise ValueError(
            f"`{called}` must return an array of the shape of the image, {target.shape}; got "
            f"{described(predicted)} from {type(denoiser).__name__}."
        )
    dtype = at_least_float32(jnp.result_type(predicted))
    return jnp.sum((predicted.astype(dtype) - target.astype(dtype)) ** 2)
