"""An entry of the gallery, computed as users run it, and not in the settings of the tests."""

import contextlib

import jax


@contextlib.contextmanager
def as_users():
    """JAX's own settings. In float64 the same keys would draw another task."""
    promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with jax.enable_x64(False), promotion[0], promotion[1]:
        yield


def computed(entry, size):
    """The results of an entry."""
    with as_users():
        return entry.compute(size)
