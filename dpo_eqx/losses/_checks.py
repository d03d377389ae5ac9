"""Range checks of hyper-parameters that are Python numbers.

Arrays, traced or not, always pass, since their values are not known at trace time.
"""

from numbers import Real

from .._jax.describe import described
from ._form import Scalar


def check_positive(**values: Scalar) -> None:
    """Raises if a Python number is not positive; arrays, traced or not, pass."""
    for name, value in values.items():
        # `not value > 0` also rejects NaN, for which every comparison is false.
        if _is_known(name, value) and not value > 0:
            raise ValueError(f"`{name}` must be positive; got {value}.")


def check_nonnegative(**values: Scalar) -> None:
    """Raises if a Python number is negative or NaN; arrays, traced or not, pass."""
    for name, value in values.items():
        if _is_known(name, value) and not value >= 0:
            raise ValueError(f"`{name}` must not be negative; got {value}.")


def check_range(*, low: float | int, below: float | int, **values: Scalar) -> None:
    """Raises if a Python number is outside `[low, below)`; arrays, traced or not, pass."""
    for name, value in values.items():
        if _is_known(name, value) and not low <= value < below:
            raise ValueError(f"`{name}` must be in [{low}, {below}); got {value}.")


def check_between(*, above: float | int, below: float | int, **values: Scalar) -> None:
    """Raises if a Python number is outside `(above, below)`; arrays, traced or not, pass."""
    for name, value in values.items():
        if _is_known(name, value) and not above < value < below:
            raise ValueError(f"`{name}` must be in ({above}, {below}); got {value}.")


def _is_known(name: str, value: Scalar) -> bool:
    """Whether a hyper-parameter is a Python number; raises if it is neither that nor an array."""
    is_array = hasattr(value, "dtype") or hasattr(value, "__jax_array__")
    if not isinstance(value, Real) and not is_array:
        raise ValueError(
            f"`{name}` must be a number, or an array of one number or of one for each pair; got "
            f"{described(value)}."
        )
    return isinstance(value, Real)
