"""Digests of content, which are the keys of the caches: files, arrays, settings, whole policies.

Equal content gives an equal digest in every process. An object whose content cannot be read raises.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..sharding import gather


def digest(*values: Any) -> str:
    """A digest, in 32 hexadecimal digits, of any tree of arrays, numbers, text and modules.

    Arrays that are sharded over several processes are gathered, so all of these must call it. A
    function counts by its name, code, defaults and closure; an Equinox module by its class and
    its fields, static fields included.

    **Raises:**

    `ValueError` for an object whose content cannot be read.
    """
    state = hashlib.blake2b(digest_size=16)
    _add(state.update, values, set())
    return state.hexdigest()


def digest_files(files: Iterable[Path], *settings: Any) -> str:
    """A digest of the content of `files` in their order, and of `settings`."""
    contents = []
    for file in files:
        with file.open("rb") as opened:
            contents.append(hashlib.file_digest(opened, "blake2b").hexdigest())
    return digest(contents, *settings)


def _add(update: Callable[[bytes], None], value: Any, seen: set[int]) -> None:
    """Feeds `value` to `update`, each part with its type and size, so that no two trees collide."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.ascontiguousarray(gather(value))
        # Not the array's `repr`, which is abbreviated and depends on NumPy's print options.
        update(f"array {array.dtype.name} {array.shape};".encode())
        update(array.tobytes())
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | Path):
        text = repr(value)
        update(f"{type(value).__name__} {len(text)} {text};".encode("utf-8", "surrogatepass"))
    elif isinstance(value, Mapping):
        _add_all(update, "mapping", [part for item in value.items() for part in item], seen)
    elif isinstance(value, list | tuple):
        _add_all(update, type(value).__name__, list(value), seen)
    elif isinstance(value, set | frozenset):
        # Sorted by digest: a set of text has another order in each process.
        _add_all(update, "set", sorted(digest(item) for item in value), seen)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
        _add_class(update, type(value))
        _add_all(update, _name(type(value)), fields, seen)
    elif isinstance(value, type | np.dtype) or inspect.ismodule(value):
        update(f"type {_name(value)};".encode())
    elif callable(value):
        _add_function(update, value, seen)
    elif slots := getattr(type(value), "__slots__", ()):
        # A plain class whose content lies in slots, as a checkpoint's companion files do.
        _add_class(update, type(value))
        _add_all(update, _name(type(value)), [getattr(value, name) for name in slots], seen)
    else:
        raise ValueError(
            f"A cache is keyed by content, and {type(value).__name__} has none that can be read; "
            f"got {value!r}. Make it a module of arrays, numbers and text."
        )


def _add_all(update: Callable[[bytes], None], kind: str, parts: list, seen: set[int]) -> None:
    update(f"{kind} {len(parts)};".encode())
    for part in parts:
        _add(update, part, seen)


def _add_class(update: Callable[[bytes], None], cls: type) -> None:
    """Feeds the code of the methods: equal weights with another forward pass are another policy."""
    for owner in cls.__mro__:
        if owner.__module__.partition(".")[0] in ("builtins", "equinox", "typing", "abc"):
            continue
        for name in sorted(vars(owner)):
            code = getattr(inspect.unwrap(getattr(owner, name)), "__code__", None)
            if code is not None:
                update(name.encode())
                _add_code(update, code)


def _add_function(update: Callable[[bytes], None], value: Any, seen: set[int]) -> None:
    if isinstance(value, functools.partial):
        _add_all(update, "partial", [value.func, value.args, value.keywords], seen)
        return
    update(f"function {_name(value)};".encode())
    value = inspect.unwrap(value)
    if id(value) in seen:  # a recursive function is in its own closure
        return
    seen.add(id(value))
    bound = getattr(value, "__self__", None)
    if bound is not None and not inspect.ismodule(bound):
        _add(update, bound, seen)
    code = getattr(value, "__code__", None)
    if code is not None:
        _add_code(update, code)
        _add(update, [value.__defaults__, value.__kwdefaults__], seen)
        _add(update, [cell.cell_contents for cell in value.__closure__ or ()], seen)


def _add_code(update: Callable[[bytes], None], code: Any) -> None:
    update(code.co_code)
    update(json.dumps(code.co_names).encode())
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            _add_code(update, constant)
        elif isinstance(constant, frozenset):  # its `repr` depends on the process
            update(digest(constant).encode())
        else:
            update(repr(constant).encode("utf-8", "surrogatepass"))


def _name(value: Any) -> str:
    module = getattr(value, "__module__", "")
    return f"{module}.{getattr(value, '__qualname__', getattr(value, '__name__', str(value)))}"
