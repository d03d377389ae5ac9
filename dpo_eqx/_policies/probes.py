"""Checks of what a policy returns, each a function that yields sentences about faults.

They run the policy on a few rows of tokens. `recurrence_probe.py` reads rows in parts,
`training_probes.py` checks what is trained, and `check_policy.py` puts all checks together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._arrays.batches import PreferenceBatch
from .._arrays.tokens import Tokens
from .._jax.dtypes import at_least_float32
from .._jax.inference_mode import in_inference
from .._scoring.policy_checks import call_policy
from .._scoring.score import score_pairs
from .adapt import adapt

# A multiple of the dtype's spacing at the largest logit: for one program, and for two programs
# that round differently.
_SAME, SIMILAR = 2**6, 2**12

_run = eqx.filter_jit(call_policy)


@dataclass(frozen=True)
class Probe:
    """A policy with what the checks run it on.

    **Arguments:**

    - `policy`: the policy as it came.
    - `ids`: tokens of shape `(length,)`.
    - `vocab`: the number of tokens in its vocabulary.
    - `key`: a key for training.
    - `takes_key`: whether the policy can be called with a key.
    - `trainable`: the filter of what is trained.
    """

    policy: PyTree
    ids: np.ndarray
    vocab: int
    key: Any
    takes_key: bool
    trainable: PyTree

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """The logits in evaluation: in inference mode, without a key."""
        return as_numpy(_run(in_inference(self.policy), jnp.asarray(ids), None))

    def fresh_logits(self, *, training: bool) -> np.ndarray:
        """The logits from a new trace, which shows what Python keeps or draws between calls."""
        policy = self.policy if training else in_inference(self.policy)
        key = self.key if training and self.takes_key else None
        run = eqx.filter_jit(lambda policy, ids, key: call_policy(policy, ids, key))
        return as_numpy(run(policy, jnp.asarray(self.ids), key))

    def changed(self, start: int) -> np.ndarray:
        """The tokens with all from `start` on replaced by other tokens."""
        other = self.ids.copy()
        other[start:] = (other[start:] + 1 + np.arange(other.size - start) % 2) % self.vocab
        return other


def as_numpy(logits: Any) -> np.ndarray:
    """Logits as NumPy's float32 or float64."""
    return np.asarray(logits.astype(at_least_float32(logits.dtype)))


def differ(probe: Probe, a: np.ndarray, b: np.ndarray, spacings: int) -> bool:
    """Whether two arrays of logits differ by more than rounding."""
    floats = [x for x in jax.tree.leaves(probe.policy) if eqx.is_inexact_array(x)]
    # NumPy's float64 is float32 in a program, unless x64 is on.
    dtypes = {jax.dtypes.canonicalize_dtype(x.dtype) for x in floats}
    # The coarsest dtype of the parameters bounds how exactly the policy computes.
    spacing = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=float(2**-23))
    finite = np.isfinite(a) & np.isfinite(b)
    if (np.isfinite(a) != np.isfinite(b)).any():
        return True
    a, b = a[finite], b[finite]
    scale = max(1.0, np.abs(a).max(initial=0))
    return bool(np.abs(a - b).max(initial=0) > spacings * max(spacing, 2**-42) * scale)


def check_values(probe: Probe) -> Iterator[str]:
    """The logits are numbers, and logits."""
    logits = probe.logits(probe.ids)
    if np.isnan(logits).any() or np.isposinf(logits).any() or np.isneginf(logits).all(-1).any():
        yield "The logits are NaN or infinite. Check the initialisation and divisions by zero."
    elif (logits >= 0).all() and np.allclose(logits.sum(-1), 1, atol=1e-3):
        yield "The policy returns probabilities. Return the logits, before the softmax."


def check_dtype(probe: Probe) -> Iterator[str]:
    """The logits are as exact as the parameters."""
    dtype = eqx.filter_eval_shape(
        call_policy, probe.policy, jnp.asarray(probe.ids), key_in_training(probe)
    ).dtype
    floats = [x.dtype for x in jax.tree.leaves(probe.policy) if eqx.is_inexact_array(x)]
    if jnp.finfo(dtype).bits < 32 and all(jnp.finfo(x).bits >= 32 for x in floats):
        yield (
            f"The logits are in {dtype}, though no parameter is that narrow. Compute the logits in "
            "float32: log-probabilities of a long completion need it."
        )


def key_in_training(probe: Probe) -> Any:
    """The key of a call in training."""
    return probe.key if probe.takes_key else None


def check_vocabulary(probe: Probe) -> Iterator[str]:
    """There is one logit for each token, and each token has a row of the embedding."""
    logits = probe.logits(probe.ids)
    if logits.shape[-1] != probe.vocab:
        yield (
            f"The policy returns {logits.shape[-1]} logits for each position, but `vocab` is "
            f"{probe.vocab}. Check the output layer; if it is padded, pass its padded size."
        )
    rows = [
        layer.num_embeddings
        for layer in jax.tree.leaves(probe.policy, is_leaf=_is_embedding)
        if _is_embedding(layer)
    ]
    if rows and logits.shape[-1] > max(rows):
        yield (
            f"The policy returns {logits.shape[-1]} logits, but its embedding has {max(rows)} "
            "rows. JAX reads the last row for larger ids, without an error."
        )


def _is_embedding(node: Any) -> bool:
    return isinstance(node, eqx.nn.Embedding)


def check_causality(probe: Probe) -> Iterator[str]:
    """A change of later tokens changes no earlier logits."""
    base, size = probe.logits(probe.ids), probe.ids.size
    for start in sorted({1, size // 2, size - 1}):
        if differ(probe, base[:start], probe.logits(probe.changed(start))[:start], _SAME):
            yield (
                f"The policy is not causal: other tokens from position {start} on changed logits "
                "before it. Mask attention to the right, shift by slicing and not by `jnp.roll`, "
                "and take no statistics over the whole row. If it is a masked model, score it by "
                "`dpx.pseudo_score`."
            )
            return


def check_dependence(probe: Probe) -> Iterator[str]:
    """The logits at a position depend on the token there, and on the token before."""
    base, last = probe.logits(probe.ids), probe.ids.size - 1
    if not differ(probe, base[last], probe.logits(probe.changed(last))[last], 0):
        yield (
            "The logits at a position do not depend on the token there. `logits[t]` must predict "
            "`ids[t + 1]` from `ids[: t + 1]`: check for a shift by one, and for an input that is "
            "not used."
        )


def check_padding(probe: Probe) -> Iterator[str]:
    """The padding behind a row, and its width, do not change the logits of the row."""
    base = probe.logits(probe.ids)
    for size in sorted({1, probe.ids.size // 2}):
        try:
            alone = probe.logits(probe.ids[:size])
        except Exception as error:  # the policy's own error, of any class
            yield (
                f"The policy runs on {probe.ids.size} tokens, but not on {size}: {summary(error)} "
                "Rows of different batches have different widths."
            )
            return
        padded = probe.logits(np.pad(probe.ids[:size], (0, probe.ids.size - size)))
        leaks = differ(probe, alone, padded[:size], SIMILAR)
        if leaks or differ(probe, alone, base[:size], SIMILAR):
            yield (
                f"Padding leaks: the logits of {size} tokens change if the row is padded on the "
                "right. Count positions from the left, and take no mean over the row."
            )
            return


def check_determinism(probe: Probe) -> Iterator[str]:
    """Evaluation draws no random numbers, and nothing is kept between calls."""
    base = probe.logits(probe.ids)
    if any(differ(probe, base, probe.fresh_logits(training=False), 0) for _ in range(2)):
        yield (
            "Two calls without a key differ in evaluation. Draw random numbers from `key` alone, "
            "and none without it; keep no state in Python or NumPy."
        )


def check_keys(probe: Probe) -> Iterator[str]:
    """The policy runs in training, and one key gives one result."""
    try:
        calls = [probe.fresh_logits(training=True) for _ in range(2 if probe.takes_key else 1)]
    except Exception as error:  # the policy's own error, of any class
        yield (
            f"The policy fails in training: {summary(error)} If it has dropout, let `__call__` "
            "take `key` and pass it on, or set the flags by `eqx.nn.inference_mode`."
        )
        return
    if differ(probe, calls[0], calls[-1], 0):
        yield "Two calls with one key differ. Draw random numbers from `key` alone."


def check_vmap(probe: Probe) -> Iterator[str]:
    """The policy can be mapped over a batch."""
    rows = jnp.stack([jnp.asarray(probe.ids), jnp.asarray(probe.changed(0))])
    policy = in_inference(probe.policy)
    try:
        together = as_numpy(_run_rows(policy, rows))
    except Exception as error:  # the policy's own error, of any class
        yield (
            f"The policy cannot be mapped by `jax.jit(jax.vmap(policy))`: {summary(error)} Score "
            'its rows one after the other, by `functools.partial(dpx.score_pairs, how="map")`.'
        )
        return
    alone = np.stack([probe.logits(np.asarray(row)) for row in rows])
    if differ(probe, alone, together, SIMILAR):
        yield (
            "The logits change under `jax.jit(jax.vmap(policy))`. A row may depend only on its own "
            "tokens, and not on Python state."
        )


@eqx.filter_jit
def _run_rows(policy: Any, rows: Array) -> Array:
    # The policy is an argument, so that its NumPy arrays are traced, as they are in a step.
    return jax.vmap(lambda ids: policy(ids))(rows)


def check_fast_path(probe: Probe) -> Iterator[str]:
    """A `FastPolicy` agrees with its plain call."""
    fast = in_inference(probe.policy)
    plain = adapt(fast, _call_plainly)
    got, want = (_scores(model, probe) for model in (fast, plain))
    if differ(probe, want, got, SIMILAR):
        yield (
            "`hidden` and `unembedding` disagree with the plain call of the policy: "
            f"log-probabilities differ by up to {np.abs(got - want).max():.2g} nats. Check "
            "`layout.mask()`, `layout.positions`, the final normalisation, the bias and soft cap."
        )


def _call_plainly(model: Any, ids: Any, key: Any) -> Any:
    return model(ids)


def batch_of(probe: Probe) -> PreferenceBatch:
    """Two pairs of different lengths, made of the tokens of the probe."""
    size = max(2, probe.ids.size // 3)
    ids = [np.stack([np.resize(np.roll(probe.ids, i + j), size) for j in (0, 1)]) for i in range(3)]
    mask = np.arange(size) < np.array([[size], [size - 1]])
    prompt, chosen, rejected = map(Tokens, ids, (mask, mask[::-1], mask))
    return PreferenceBatch(prompt, chosen, rejected)


def _scores(policy: PyTree, probe: Probe) -> np.ndarray:
    log_probs = eqx.filter_jit(score_pairs)(policy, batch_of(probe))
    return np.concatenate([log_probs.chosen, log_probs.rejected])


def few(paths: list[str]) -> str:
    """The first three paths, and whether there are more."""
    return ", ".join(paths[:3]) + (f", and {len(paths) - 3} more" if len(paths) > 3 else "")


def summary(error: Exception) -> str:
    """The first line of an error, as a sentence."""
    line = (str(error).strip().split("\n") or [""])[0]
    return f"{type(error).__name__}: {line.rstrip('.')}."
