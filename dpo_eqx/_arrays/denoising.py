"""Batches of images for diffusion models: pairs, with the noise and the time that compare them.

Drawing the noise and adding it are not here; `_scoring/denoising.py` adds it.
"""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._jax.scalars import PerPair, Weights
from .batches import check_per_pair
from .log_probs import PairLogProbs

Images = Float[Array | np.ndarray, "pairs *image"]


class DenoisingBatch(eqx.Module):
    r"""Pairs of images of one prompt, for `denoising_score`; the chosen image is preferred.

    Noise and time are fields, because policy and reference must see the same ones. Draw them anew
    for each step.

    **Arguments:**

    - `chosen`, `rejected`: clean images $x_0$ (or latents, or any other arrays). Shape
        `(pairs, *image)`.
    - `noise`: standard normal, $\epsilon$. Shape `(pairs, *image)`.
    - `time`: the time $t$ of both images of a pair, in the unit of the denoiser and of the
        schedule, floating-point. Shape `(pairs,)`.
    - `rejected_noise`: other noise for the rejected image (default: `noise`, as in the authors'
        code; in the paper's formula the two are independent). Shape `(pairs, *image)`.
    - `condition`: a pytree of arrays of shape `(pairs, ...)`, such as the embeddings of prompts. If
        given, it is the third argument of the denoiser.
    - `weight`, `reference`, `per_pair`: as in `PreferenceBatch`. Shape `(pairs,)`.

    **Raises:**

    `ValueError` that names the field, the requirement and both shapes.
    """

    chosen: Images
    rejected: Images
    noise: Images
    time: Float[Array | np.ndarray, " pairs"]
    rejected_noise: Images | None = None
    condition: PyTree = None
    weight: Weights | None = None
    reference: PairLogProbs | None = None
    per_pair: dict[str, PerPair] | None = None

    def __check_init__(self):
        for name in ("rejected", "noise", "rejected_noise"):
            images = getattr(self, name)
            if images is not None and images.shape != self.chosen.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `chosen`, {self.chosen.shape}; got "
                    f"{images.shape}."
                )
        if self.time.shape != self.chosen.shape[:1]:
            raise ValueError(
                "`time` must have one value for each pair of `chosen`, shape "
                f"{self.chosen.shape[:1]}; got {self.time.shape}."
            )
        check_per_pair(self)

    @property
    def pairs(self) -> int:
        """The number of pairs."""
        return self.time.shape[0]
