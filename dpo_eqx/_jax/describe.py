"""A short description of any value, for error messages.

What the errors are about is said where they are raised.
"""

from typing import Any

import jax
import numpy as np


def described(value: Any) -> str:
    """A short name for whatever came: shapes and dtypes of arrays, classes of other things."""
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
