"""The check of a policy that reads in parts: `start` and `extend` agree with its plain call.

`probes.py` has the other checks of what a policy returns.
"""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._jax.inference_mode import in_inference
from .._scoring.policy_checks import call_extend, call_start
from .._scoring.predict import unembedding_of
from .probes import SIMILAR, Probe, as_numpy, differ


def check_recurrence(probe: Probe) -> Iterator[str]:
    """A `RecurrentPolicy` agrees with its plain call, read in three parts."""
    first, size = probe.ids.size // 2, probe.ids.size
    # The prompt is padded with other tokens than those that follow it.
    prompt, length = jnp.asarray(probe.changed(first)), jnp.asarray(first, jnp.int32)
    parts = jnp.split(jnp.asarray(probe.ids[first:]), [(size - first) // 2])
    got = as_numpy(_read_in_parts(in_inference(probe.policy), prompt, length, parts))
    want = probe.logits(probe.ids)[first - 1 :]
    if got.shape != want.shape or differ(probe, want, got, SIMILAR):
        yield (
            "`start` and `extend` disagree with the plain call of the policy. Check that the "
            "padding of a prompt does not enter the state, that `extend` returns all of the state, "
            "the final normalisation, the bias and soft cap."
        )


@eqx.filter_jit
def _read_in_parts(
    policy: Any, prompt: Int[Array, " prompt"], first: Int[Array, ""], parts: list[Array]
) -> Float[Array, "length vocab"]:
    """The logits from the last real token of the prompt on."""
    state, hidden = call_start(policy, prompt, first, None)
    found = [hidden[None]]
    for part in parts:
        state, hidden = call_extend(policy, state, part, None)
        found.append(hidden)
    return unembedding_of(policy).logits(jnp.concatenate(found))
