"""This library's sampler: a completion of each prompt, by `models.generate`."""

import jax
import jax.numpy as jnp
import numpy as np

import dpo_eqx as dpx
from benchmarks.sample import Drawing, checksum
from benchmarks.turns import Turns
from benchmarks.workers import given
from dpo_eqx import models


def main() -> None:
    turns = Turns(version=f"JAX {jax.__version__}")
    drawing, folder = given(Drawing)
    policy = models.load(folder / "policy", dtype=jnp.dtype(drawing.dtype))
    is_greedy = drawing.top_p is None
    how = {"temperature": 0.0 if is_greedy else 1.0, "top_p": drawing.top_p}
    turns.begin()
    for batch, length, new in drawing.calls():
        ids = drawing.ids(batch, length)
        prompt = dpx.Tokens(ids, np.ones(ids.shape, bool))
        key = None if is_greedy else jax.random.key(new)
        drawn = models.generate(policy, prompt, max_new_tokens=new, key=key, **how)
        if not turns.step_done(checksum(drawing, np.asarray(drawn.ids))):
            return


if __name__ == "__main__":
    main()
