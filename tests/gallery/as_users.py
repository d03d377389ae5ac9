"""An entry of the gallery, computed as users run it, and not in the settings of the tests."""

import contextlib

import jax

from ..pages import as_users as pages


@contextlib.contextmanager
def as_users():
    """JAX's own settings. In float64 the same keys would draw another task."""
    with pages.as_users(), jax.numpy_rank_promotion("allow"):
        yield


def computed(entry, size):
    """The results of an entry."""
    with as_users():
        return entry.compute(size)
