"""Imports of the packages that belong to an extra, with an error that names the extra.

Nothing is imported here until it is asked for, so the core does not depend on any of it.
"""

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """The module of this name, or an `ImportError` that says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"`{error.name}` is needed here and is not installed. Install the extra that brings "
            f'it, in a clone of dpo_eqx: pip install ".[{extra}]".'
        ) from error
