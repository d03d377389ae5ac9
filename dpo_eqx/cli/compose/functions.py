"""A Python function that a flag names, as `module:function` or `file.py:function`.

What the function does is the business of the flag.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..settings.options import FUNCTION


def load_function(named: str, flag: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names.

    Modules are also found in the current folder. A file is executed at each call.

    **Arguments:**

    - `named`: the value of the flag, for which `is_function` is true.
    - `flag`: the flag, such as `--reward`.

    **Raises:**

    `ValueError` if the module cannot be imported, or has no such function.
    """
    match = FUNCTION.fullmatch(named)
    assert match is not None, "`is_function` has seen it"
    name, attribute = match.groups()
    try:
        module = _module(name)
    except Exception as error:  # a module of the user can raise anything
        raise ValueError(
            f"`{flag} {named}` must name a function as `module:function` or `file.py:function`; "
            f"importing {name} raised {type(error).__name__}: {error}. The module must be a file "
            "in the current folder, or installed."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [n for n, _ in inspect.getmembers(module, inspect.isfunction)]
        raise ValueError(
            f"`{flag} {named}` must name a function of {name}; it has no function "
            f"`{attribute}`. It has {', '.join(f'`{n}`' for n in functions) or 'no function'}."
        )
    return function


def file_of(function: Callable[..., Any]) -> Path | None:
    """The file of a function's module; `None` if it has none."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file)


def _module(name: str) -> Any:
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None, "the name ends with .py"
        assert spec.loader is not None, "the name ends with .py"
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)
