"""This library's sampler: greedy completions of each prompt, by `models.generate`."""

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
    turns.begin()
    for batch, length, new in drawing.calls():
        ids = drawing.ids(batch, length)
        prompt = dpx.Tokens(ids, np.ones(ids.shape, bool))
        drawn = models.generate(policy, prompt, max_new_tokens=new, temperature=0)
        if not turns.step_done(checksum(np.asarray(drawn.ids))):
            return


if __name__ == "__main__":
    main()
