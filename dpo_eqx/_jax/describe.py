"""A short description of any value, for error messages.

The code that raises an error writes the rest of its message.
"""

from typing import Any

import jax
import numpy as np


def described(value: Any) -> str:
    """A short description of `value`: shape and dtype of an array, class of most other objects."""
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.shape} in {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {'; '.join(map(described, value[:4]))}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, bool | int | float | complex | str | np.generic):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}..."
    return f"an object of class {type(value).__name__}"
