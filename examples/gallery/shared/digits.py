"""A small diffusion model of scikit-learn's 8x8 digits, and a reader who prefers more ink.

Nothing is trained here; the script does that.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from sklearn.datasets import load_digits
from sklearn.svm import SVC

CLASSES, PIXELS = 10, 64
TEMPERATURE = 0.02  # of the reader, in units of ink, which varies by 0.03 within a class
END = np.pi / 2  # the time at which an image is noise


class Denoiser(eqx.Module):
    """Predicts `v` of one image of a class, from the image, the time and the class."""

    mlp: eqx.nn.MLP

    def __init__(self, width: int, key: PRNGKeyArray):
        self.mlp = eqx.nn.MLP(PIXELS + 3 + CLASSES, PIXELS, width, 2, jax.nn.silu, key=key)

    def __call__(
        self, noisy: Float[Array, " pixels"], time: Float[Array, ""], label: Int[Array, ""]
    ) -> Float[Array, " pixels"]:
        times = jnp.stack([time, jnp.cos(time), jnp.sin(time)])
        return self.mlp(jnp.concatenate([noisy, times, jax.nn.one_hot(label, CLASSES)]))


def schedule(time: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The factors of the image and of the noise: a quarter of a circle."""
    return jnp.cos(time), jnp.sin(time)


def load() -> tuple[Float[Array, "digits pixels"], Int[np.ndarray, " digits"]]:
    """All images, with pixels from -1 to 1, and their classes."""
    images, classes = load_digits(return_X_y=True)
    return jnp.asarray(images) / 8 - 1, np.asarray(classes)


def classify(images: Float[np.ndarray, "*n pixels"]) -> Int[np.ndarray, "*n"]:
    """The digit that a support vector machine, fitted to all digits, sees in each image."""
    flat = (images.clip(-1, 1) + 1).reshape(-1, PIXELS) * 8
    seen = SVC().fit(*load_digits(return_X_y=True)).predict(flat)
    return seen.reshape(images.shape[:-1])


def ink(images: Float[Array | np.ndarray, "*n pixels"]) -> Float[Array | np.ndarray, "*n"]:
    """The mean of the pixels of each image, from 0 to 1."""
    return (images.clip(-1, 1).mean(-1) + 1) / 2


def prefer(
    images: Float[Array, "digits pixels"],
    labels: Int[np.ndarray, " digits"],
    key: PRNGKeyArray,
    count: int,
) -> tuple[Float[Array, "count pixels"], Float[Array, "count pixels"], Int[Array, " count"]]:
    """Pairs of digits of a random class: the chosen ones, the rejected ones, and their class.

    The reader is Bradley and Terry's, with the ink as reward.
    """
    for_class, for_images, for_reader = jax.random.split(key, 3)
    order, sizes = np.argsort(labels), np.bincount(labels, minlength=CLASSES)
    label = jax.random.randint(for_class, (count,), 0, CLASSES)
    first, number = (jnp.asarray(x)[label][None] for x in (np.cumsum(sizes) - sizes, sizes))
    a, b = images[
        jnp.asarray(order)[jax.random.randint(for_images, (2, count), first, first + number)]
    ]
    sure = jax.nn.sigmoid((ink(a) - ink(b)) / TEMPERATURE)
    a_first = (jax.random.uniform(for_reader, (count,)) < sure)[:, None]
    return jnp.where(a_first, a, b), jnp.where(a_first, b, a), label


def draw(
    denoiser: Denoiser, labels: Int[Array, " n"], key: PRNGKeyArray, steps: int = 40
) -> Float[Array, "n pixels"]:
    """An image of each class in `labels`. A step of the sampler is a rotation."""
    angle = END / steps

    def turn(images, time):
        v = jax.vmap(denoiser, (0, None, 0))(images, time, labels)
        return jnp.cos(angle) * images - jnp.sin(angle) * v, None

    noise = jax.random.normal(key, (labels.size, PIXELS))
    return jax.lax.scan(turn, noise, jnp.linspace(END, 0, steps, endpoint=False))[0]
