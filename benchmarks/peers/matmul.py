"""The machine's own rate of large float32 matrix products, through JAX."""

import jax
import jax.numpy as jnp

from benchmarks.problem import PRODUCT
from benchmarks.turns import Turns


def main() -> None:
    turns = Turns(version=f"JAX {jax.__version__}")
    a, b = jax.random.normal(jax.random.key(0), (2, PRODUCT, PRODUCT), jnp.float32)
    product = jax.jit(jnp.matmul)
    turns.begin()
    while turns.step_done(float(product(a, b)[0, 0])):
        pass


if __name__ == "__main__":
    main()
