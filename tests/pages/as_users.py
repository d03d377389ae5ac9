"""What pages and examples compute, under JAX's own settings rather than those of the tests."""

import contextlib

import jax

from .fences import blocks


@contextlib.contextmanager
def as_users():
    """JAX as it is for users: float32, and dtypes are promoted."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def run(page, names=None):
    """What a reader has after typing the page's Python, with `names` to begin with."""
    names = dict(names or {})
    with as_users():
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)
    return names
