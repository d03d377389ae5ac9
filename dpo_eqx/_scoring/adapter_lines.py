"""Finds the line of code that makes a policy of another signature callable as `policy(ids)`.

It runs only after a policy has failed, and on shapes alone. Nothing here raises or runs a policy.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._jax.inference_mode import in_inference
from .._jax.keys import Keys
from .signatures import SOME_KEY, call_with_unknowns, calls, unknown_arguments

_KEY_ADVICE = "Evaluation and the reference then use this fixed key."


class Line(NamedTuple):
    """A line that adapts a model, and a sentence about it, which may be empty."""

    code: str
    advice: str = ""

    def __str__(self) -> str:
        wrap = f"`policy = dpx.adapt(model, lambda model, ids, key: {self.code})`."
        return f"{wrap} {self.advice}" if self.advice else wrap


def adapter_line(policy: PyTree, ids: Array, key: Keys | None) -> Line | None:
    """The line that adapts `policy`, or `None` if none of the known ones gives logits.

    A line is run on shapes, with a key and without one, before it is returned. A line with names
    that only the user knows cannot be run.
    """
    unknown = unknown_arguments(policy)
    if unknown:
        return _line_with_unknowns(policy, unknown)
    for call in calls(policy, ("ids", "ids[None]")):
        if line := _tried(policy, call, ids, key):
            return line
    return _line_of_last_position(policy, ids, key) or _line_of_fixed_length(policy, ids, key)


def fails_in_vmap(policy: PyTree, ids: Array, key: Keys | None) -> bool | None:
    """Whether `jax.vmap` fails on a policy that runs on one row; `None` if it fails on that, too.

    It is tried on shapes.
    """
    call = "model(ids)" if key is None else "model(ids, key=key)"
    given = None if key is None else _shape_of_key(key)
    if "" not in (_picked(policy, call, ids, given) or ()):
        return None
    mapped = f"jax.vmap(lambda ids: {call})(ids[None])"
    return "[0]" not in (_picked(policy, mapped, ids, given) or ())


def only_needs_key(policy: PyTree, ids: Array | np.ndarray) -> bool:
    """Whether the policy needs a key in training, as dropout does, and none in inference."""

    def runs(policy: PyTree, call: str, key: Any) -> bool:
        return "" in (_picked(policy, call, ids, key) or ())

    return (
        runs(in_inference(policy), "model(ids)", None)
        and runs(policy, "model(ids, key=key)", _shape_of_key(None))
        and not runs(policy, "model(ids)", None)
    )


def takes_batch(policy: PyTree, ids: Array, key: Keys | None) -> bool:
    """Whether the policy takes ids `(rows, length)`, and returns logits `(rows, length, vocab)`.

    It must do so with the key, if there is one, and without.
    """
    calls: dict[str, Any] = {"model(ids[None])": None}
    if key is not None:
        calls["model(ids[None], key=key)"] = _shape_of_key(key)
    return all("[0]" in (_picked(policy, call, ids, given) or ()) for call, given in calls.items())


def _tried(policy: PyTree, call: str, ids: Array, key: Keys | None) -> Line | None:
    """The line of `call` with what picks the logits from its result, if that exists."""
    alone = _picked(policy, call, ids, None) or ()
    keyed = (alone and _picked(policy, call, ids, _shape_of_key(key))) or ()
    both = [pick for pick in alone if pick in keyed]
    if not both:
        return None
    best = next((pick for pick in both if "logits" in pick), both[0])
    others = [pick for pick in both if pick != best]
    if others:
        return Line(call + best, f"`{call}{others[0]}` has the shape of logits, too.")
    return Line(call + best, _KEY_ADVICE if SOME_KEY in call else "")


def _picked(policy: PyTree, call: str, ids: Array | np.ndarray, key: Any) -> list[str] | None:
    """`_picks` for `ids` and the shape of a key; `None` if the call fails."""
    try:
        return _picks(policy, call, ids.size, ids.dtype, key)
    except Exception:  # the model's own error, of any class: this way to call it is wrong
        return None


def _picks(policy: PyTree, call: str, size: int, dtype: Any, key: Any) -> list[str]:
    """The suffixes that pick arrays of the shape of logits from what `call` returns."""
    function = _compiled(call)
    found = []

    def run(ids, key):
        found.extend(_logits_in(function(policy, ids, key), size))

    shape = jax.ShapeDtypeStruct((size,), dtype)
    # Inside `eval_shape`, results of classes that JAX does not know can be looked at, too.
    if key is None:
        jax.eval_shape(lambda ids: run(ids, None), shape)
    else:
        jax.eval_shape(run, shape, key)
    return found


def _compiled(call: str) -> Callable:
    """The function that the user is told to write, from its text: what is printed was tried."""
    return eval(f"lambda model, ids, key: {call}", {"jax": jax, "jnp": jnp})


def _logits_in(value: Any, size: int, depth: int = 3) -> Iterator[str]:
    """The suffixes that lead from `value` to floating-point arrays `(size, vocab)`."""
    if isinstance(value, jax.Array | np.ndarray):
        if jnp.issubdtype(value.dtype, jnp.floating):
            yield from _slices(value.shape, size)
    elif depth:
        for suffix, part in _parts(value):
            yield from (suffix + rest for rest in _logits_in(part, size, depth - 1))


def _slices(shape: tuple[int, ...], size: int) -> Iterator[str]:
    if len(shape) == 2 and shape[0] == size:
        yield ""
    elif len(shape) == 2 and shape[0] > size:
        yield "[: ids.size]"
    elif len(shape) == 3 and shape[0] == 1 and shape[1] >= size:
        yield "[0]" if shape[1] == size else "[0, : ids.size]"
    elif len(shape) == 3 and shape[1] == 1 and shape[0] == size:
        yield "[:, 0]"


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{name!r}]", part) for name, part in value.items()]
    if names := getattr(value, "_fields", None):  # a `NamedTuple`
        return [(f".{name}", getattr(value, name)) for name in names]
    if isinstance(value, tuple | list):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    return [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()]


def _line_with_unknowns(policy: PyTree, unknown: list[str]) -> Line:
    call = call_with_unknowns(policy, unknown)
    if any("state" in name for name in unknown):
        return Line(
            f"{call}[0]",
            "The state is then frozen: each call reads a copy of it from outside the policy, and "
            "it is neither trained nor updated. Switch layers such as BatchNorm to their running "
            "statistics by `model = eqx.nn.inference_mode(model)` first.",
        )
    names = " and ".join(f"`{name}`" for name in unknown)
    return Line(call, f"Define {names} outside, or write the value in its place.")


def _line_of_last_position(policy: PyTree, ids: Array, key: Keys | None) -> Line | None:
    """The line for a policy that returns the logits of the last position only."""
    for call in calls(policy, ("ids[: i + 1]",)):
        stacked = f"jnp.stack([{call} for i in range(ids.size)])"
        if line := _tried(policy, stacked, ids, key):
            advice = (
                "This runs the model once for each token, because it returns the logits of the "
                "last position only. It is faster to apply its head to all positions in its code."
            )
            return Line(line.code, advice)
    return None


def _line_of_fixed_length(policy: PyTree, ids: Array, key: Keys | None) -> Line | None:
    """The line for a policy that runs on rows of one length only."""
    longer = sorted({size for size in _sizes(policy) if size > ids.size})
    for size in longer:
        padded = f"jnp.pad(ids, (0, {size} - ids.size))"
        for call in calls(policy, (padded, f"{padded}[None]")):
            if line := _tried(policy, call, ids, key):
                return line._replace(advice=f"The model runs on rows of {size} tokens only.")
    return None


def longest_length(policy: PyTree, ids: Array) -> int | None:
    """The largest number of tokens, fewer than those of `ids`, on which the policy runs."""
    for size in sorted({size for size in _sizes(policy) if size < ids.size}, reverse=True):
        for call in calls(policy, ("ids", "ids[None]")):
            if _picked(policy, call, np.zeros(size, ids.dtype), None):
                return size
    return None


def vector_size(policy: PyTree) -> int | None:
    """The number of features in the vector that the policy takes in place of ids, if it does."""
    for size in sorted(_sizes(policy)):
        features = np.zeros(size, jnp.zeros(()).dtype)
        for call in calls(policy, ("ids",)):
            if _picked(policy, call, features, None) is not None:
                return size
    return None


def _sizes(policy: PyTree) -> set[int]:
    """Lengths that the policy may be made for: the sizes of its arrays, and its whole numbers."""
    arrays = (x for x in jax.tree.leaves(policy) if isinstance(x, jax.Array | np.ndarray))
    fields = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    numbers = (getattr(policy, field.name, None) for field in fields)
    found = {size for x in arrays for size in x.shape}
    return found | {n for n in numbers if isinstance(n, int) and 1 < n <= 2**20}


def _shape_of_key(key: Keys | None) -> jax.ShapeDtypeStruct:
    made = jax.eval_shape(lambda: jax.random.key(0)) if key is None else key
    return jax.ShapeDtypeStruct(made.shape, made.dtype)
