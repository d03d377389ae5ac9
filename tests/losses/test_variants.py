"""Each loss under each of chex's variants: jitted or not, on a device or not, under `pmap`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from .cases import CASES, NAMES, close, draw, records

ROWS = [(name, case) for name, case in zip(NAMES, CASES, strict=True)]


class Variants(chex.TestCase):
    """`chex.variants` needs a class."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
    @parameterized.named_parameters(*ROWS)
    def test_agrees_with_the_oracle(self, case):
        p = draw(case)
        run = self.variant(lambda policy, reference: case.loss(policy, reference, **case.hyper))
        result = run(*records(case, p))
        close(result.loss, case.oracle(p, **case.hyper)[0])
        chex.assert_tree_all_finite(result)

    @chex.variants(without_device=True)
    @parameterized.named_parameters(*ROWS)
    def test_takes_numpy_arrays(self, case):
        p = draw(case)
        run = self.variant(lambda policy, reference: case.loss(policy, reference, **case.hyper))
        result = run(*jax.tree.map(np.asarray, records(case, p)))
        close(result.loss, case.oracle(p, **case.hyper)[0])
        assert all(isinstance(x, jnp.ndarray) for x in jax.tree.leaves(result))
