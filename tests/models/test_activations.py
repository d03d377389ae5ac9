"""All activations against the values that `transformers` computes in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from dpo_eqx.models._decoder.basic_layers import ACTIVATIONS

from ..policies import assert_close
from .golden import FOLDER


def test_activations_are_those_of_transformers():
    golden = json.loads((FOLDER / "activations.json").read_text())
    x = jnp.asarray(golden["x"], jnp.float64)
    got = jax.jit(lambda x: {name: function(x) for name, function in ACTIVATIONS.items()})(x)
    assert_close(got, {name: np.asarray(y) for name, y in golden["values"].items()}, 1e-12)
