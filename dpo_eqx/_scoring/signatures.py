"""Reads the signature of a model: how it may be called, and which arguments only the user knows.

`adapter_lines.py` tries the calls.
"""

import inspect
import itertools
from collections.abc import Iterator

import equinox as eqx
import jax
from jaxtyping import PyTree

_IDS = {"ids", "input_ids", "token_ids", "tokens", "token", "inputs", "input", "x", "xs"}
_KEYS = {"key", "rng", "prng_key", "rng_key", "dropout_key"}
_OFF = {"deterministic", "inference", "inference_mode"}
_ON = {"train", "training", "is_training", "train_mode", "enable_dropout"}
_POSITIONS = {"positions", "position_ids", "pos"}
_CACHES = {"cache", "kv_cache", "past_key_values", "past"}
# The causal mask comes first: a model that masks nothing else must get it. A model that wants a
# mask of padding fails on its shape, and gets the next one.
_CAUSAL, _PADDING = "jnp.tril(jnp.ones((ids.size, ids.size), bool))", "jnp.ones(ids.shape, bool)"
_MASKS = (_CAUSAL, _PADDING, f"{_CAUSAL}[None]", f"{_PADDING}[None]")
SOME_KEY = "jax.random.key(0) if key is None else key"


def calls(policy: PyTree, ways_of_ids: tuple[str, ...]) -> Iterator[str]:
    """Calls of `model`, with all its arguments by their names, the likeliest first."""
    takes = _parameters(policy)
    ids_name = _ids_parameter(takes)
    if ids_name is None:
        yield from (f"model({ids})" for ids in ways_of_ids)
        return
    takes = [p for p in takes if p.name == ids_name or _is_needed(p)]
    values = [ways_of_ids if p.name == ids_name else _values_of(p.name) for p in takes]
    for chosen in itertools.product(*values):
        named = dict(zip([p.name for p in takes], chosen, strict=True))
        yield f"model({', '.join(_arguments(takes, named, ids_name))})"


def unknown_arguments(policy: PyTree) -> list[str]:
    """The names of parameters that must be given, and whose values only the user knows."""
    parameters = _parameters(policy)
    ids_name = _ids_parameter(parameters)
    return [
        p.name
        for p in parameters
        if (p.default is p.empty or _is_state_of(policy, p.name))
        and p.name != ids_name
        and not _values_of(p.name)
    ]


def call_with_unknowns(policy: PyTree, unknown: list[str]) -> str:
    """The call of `model` in which the arguments `unknown` stand by their own names."""
    takes = _parameters(policy)
    ids_name = _ids_parameter(takes) or "ids"
    takes = [p for p in takes if p.name in (ids_name, *unknown) or _is_needed(p)]
    values = {p.name: next(iter(_values_of(p.name)), p.name) for p in takes} | {ids_name: "ids"}
    # A call marks an `eqx.nn.State` that it updates as used, so each call gets a copy.
    copies = {name: f"jax.tree.map(jnp.copy, {name})" for name in unknown if "state" in name}
    return f"model({', '.join(_arguments(takes, values | copies, ids_name))})"


def _parameters(policy: PyTree) -> list[inspect.Parameter]:
    """The parameters of the policy, without `*args` and `**kwargs`."""
    try:
        found = inspect.signature(policy).parameters.values()
    except (TypeError, ValueError):  # a callable of C code has no signature
        return []
    return [p for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _ids_parameter(parameters: list[inspect.Parameter]) -> str | None:
    """The name of the parameter that takes the ids."""
    names = [p.name for p in parameters]
    known = (name for name in names if name in _IDS)
    other = (name for name in names if not _values_of(name))
    return next(known, next(other, None))


def _values_of(name: str) -> tuple[str, ...]:
    """The expressions that may be the argument called `name`; none if only the user knows it."""
    if name in _KEYS:
        return "key", SOME_KEY
    if name in _OFF:
        return ("key is None",)
    if name in _ON:
        # Some models return the last position only, unless they train.
        return "key is not None", "True"
    if name in _POSITIONS:
        return "jnp.arange(ids.size)", "jnp.arange(ids.size)[None]"
    if name in _CACHES:
        return ("None",)
    return _MASKS if "mask" in name else ()


def _is_needed(parameter: inspect.Parameter) -> bool:
    """Whether to pass it: it is required, or it switches dropout."""
    switches = parameter.name in _KEYS | _OFF | _ON
    return switches or parameter.default is parameter.empty


def _arguments(
    takes: list[inspect.Parameter], named: dict[str, str], ids_name: str
) -> Iterator[str]:
    """By position up to the ids, and by name after them."""
    seen_ids = False
    for p in takes:
        by_name = p.kind is p.KEYWORD_ONLY or (seen_ids and p.kind is not p.POSITIONAL_ONLY)
        yield f"{p.name}={named[p.name]}" if by_name else named[p.name]
        seen_ids = seen_ids or p.name == ids_name


def _is_state_of(policy: PyTree, name: str) -> bool:
    """Whether layers of the policy need the state, though `__call__` of `Sequential` does not."""

    def is_index(node):
        return isinstance(node, eqx.nn.StateIndex)

    return "state" in name and any(map(is_index, jax.tree.leaves(policy, is_leaf=is_index)))
